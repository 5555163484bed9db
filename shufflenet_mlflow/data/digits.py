"""The bundled demo set: scikit-learn's handwritten digits, written as an image folder.

1,797 grey images of 8x8 pixels in ten classes (the test set of the UCI "Optical Recognition of Handwritten Digits"),
enlarged to 32x32. Every fifth image of a class is for validation.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.files import new_folder

SIZE = 32
"""Height and width of the images."""
VAL_EVERY = 5
"""One in this many images of a class is for validation."""
MAXIMUM = 16
"""The largest grey value in the source."""


def _write_images(folder: Path) -> None:
    from sklearn.datasets import load_digits  # takes 0.6 s to import

    source = load_digits()
    counts: dict[int, int] = {}
    for pixels, digit in zip(source.images, source.target.tolist(), strict=True):
        number = counts[digit] = counts.get(digit, 0) + 1
        directory = folder / ("val" if number % VAL_EVERY == 0 else "train") / str(digit)
        directory.mkdir(parents=True, exist_ok=True)
        grey = (pixels * (255 / MAXIMUM)).round().astype(np.uint8)
        image = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        # Uncompressed, so that file sizes, and with them the digest, are equal everywhere.
        image.save(directory / f"{number:04}.png", compress_level=0)


def write_digits(folder: str | Path) -> Path:
    """Write the demo set to `folder`, as `train/<digit>/*.png` and `val/<digit>/*.png`.

    It appears whole or not at all.

    Returns:
        `folder`.

    Raises:
        DataError: `folder` exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    try:
        with new_folder(folder) as aside:
            _write_images(aside)
    except FileExistsError as error:
        raise DataError(
            f"{str(folder)!r} exists and is not empty; name a new folder", code="digits-folder-not-empty"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot write the digits to {str(folder)!r}: {error.strerror}; name another folder",
            code="digits-unwritable",
        ) from error
    return folder


def cached_digits(cache_dir: Path) -> Path:
    """Return the folder of the demo set below `cache_dir`; the first call writes it.

    Raises:
        DataError: it cannot be written.
    """
    folder = cache_dir / "digits-v1"
    if not folder.is_dir():
        try:
            write_digits(folder)
        except DataError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder
