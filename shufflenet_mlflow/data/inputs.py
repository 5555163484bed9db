"""Images as Python programs have them: paths, files, bytes, Pillow's images, arrays."""

import os
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from shufflenet_mlflow.data.decode import Picture, open_picture, picture_of
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.reading import Reading

ImageLike = str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image.Image | NDArray[Any] | Tensor
"""A path; the content of an image file, as bytes or as an open file; an image of Pillow's; uint8 (H, W, 3) RGB or
(H, W) grey; or a uint8 tensor (3, H, W), RGB."""


def open_any(image: Any, reading: Reading) -> Picture:
    """Open an `ImageLike`; the same picture is opened alike in each form.

    Raises:
        UnreadableImageError: it cannot be opened or decoded, is too large, or is of another kind.
    """
    if isinstance(image, (str, os.PathLike)):
        return open_picture(os.fspath(image), reading)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return open_picture(BytesIO(image), reading)
    if isinstance(image, Image.Image):
        encoded = _undecoded(image)
        return picture_of(image, reading) if encoded is None else open_picture(BytesIO(encoded), reading)
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise UnreadableImageError(f"a tensor of shape {tuple(image.shape)}, not (3, height, width)")
        image = image.detach().permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        return _of_array(image, reading)
    if hasattr(image, "read") and hasattr(image, "seek"):
        return open_picture(image, reading)
    raise UnreadableImageError(f"{type(image).__name__} is no path, bytes, file, PIL image or array")


def _undecoded(image: Image.Image) -> bytes | None:
    """Return the file of a JPEG that Pillow has opened and not decoded yet, so that it is decoded as from its path."""
    file = getattr(image, "fp", None)
    if not isinstance(image, JpegImageFile) or not image.tile or file is None:
        return None
    position = file.tell()
    file.seek(0)
    encoded: bytes = file.read()
    file.seek(position)
    return encoded


def _of_array(pixels: NDArray[Any], reading: Reading) -> Picture:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not pixels.size or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise UnreadableImageError(f"an array of shape {pixels.shape}, not (height, width, 3)")
    if pixels.dtype != np.uint8:
        raise UnreadableImageError(f"an array of {pixels.dtype}, not uint8 from 0 to 255")
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return Picture(np.ascontiguousarray(pixels))
    return picture_of(Image.fromarray(np.ascontiguousarray(pixels)), reading)


def listed(images: Any) -> tuple[list[Any], bool]:
    """Return images as a list, and whether they were one: several are a list, a tuple, or an array of four dimensions.

    Strings and paths count as one.
    """
    if isinstance(images, (np.ndarray, Tensor)):
        return (list(images), False) if images.ndim == 4 else ([images], True)
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return [images], True
    try:
        return list(images), False
    except TypeError:
        return [images], True  # `open_any` says what it is not
