"""`shufflenet data mean`: an image folder in, a file for `--mean-image` out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE
from shufflenet_mlflow.data.datasets import list_folder
from shufflenet_mlflow.data.loader import BadImageLog, default_workers, worker_deaths_reported
from shufflenet_mlflow.data.mean import check_output, mean_image, write_mean_image
from shufflenet_mlflow.data.preprocess import REFERENCE_SIZE, Preprocess
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag


@dataclass(frozen=True)
class MeanSummary:
    """A mean image and its origin."""

    path: Path
    n: int
    """Number of images."""
    input_size: int
    mean_BGR: tuple[float, float, float]
    """Mean over all pixels, on the 0-255 scale."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `data mean --json`."""
        return {
            "mean_image": str(self.path),
            "n": self.n,
            "input_size": self.input_size,
            "mean_bgr": list(self.mean_BGR),
        }


def run_mean(
    folder: Path,
    output: Path,
    *,
    input_size: int | None,
    workers: int | None,
    skip_bad: bool,
    reporter: Reporter,
    stop: StopFlag,
) -> MeanSummary:
    """Average the images in `folder` and write the mean image to `output`.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
    """
    check_output(output)
    size = Preprocess("bgr255", REFERENCE_SIZE if input_size is None else input_size).input_size
    listing = list_folder(str(folder), "train", option="DIR", skip_bad=skip_bad, cache_dir=None)
    bad_images = BadImageLog(skip=skip_bad)
    with worker_deaths_reported():
        mean_HWC = mean_image(
            listing,
            size,
            workers=default_workers(len(listing), DEFAULT_BATCH_SIZE, size) if workers is None else workers,
            bad_images=bad_images,
            reporter=reporter,
            stop=stop,
        )
    write_mean_image(output, mean_HWC)
    blue, green, red = (float(value) for value in mean_HWC.mean((0, 1), dtype=float))
    return MeanSummary(output, len(listing) - len(bad_images.seen), size, (blue, green, red))
