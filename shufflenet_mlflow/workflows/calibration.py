"""The images that a quantised export is calibrated on."""

from pathlib import Path

from shufflenet_mlflow.data.calibration import calibration_pixels
from shufflenet_mlflow.data.datasets import data_name, list_whole
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.export import Calibration
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.workflows.eval_images import list_images_of
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint, usable_config


def calibration_of(
    loaded: LoadedCheckpoint, directory: str | None, number: int, *, cache_dir: Path | None, reporter: Reporter
) -> Calibration:
    """Return images, evenly spaced over the training images of the checkpoint's run, or over others.

    Args:
        directory: folder or table of images; None for the run's training images.
        number: the most images to take; unreadable ones are left out.

    Raises:
        ConfigError: neither the user nor the checkpoint names images.
        DataError: they cannot be listed, or none can be read.
    """
    trained = usable_config(loaded.payload)
    if directory is not None:
        listing = list_whole(directory, option="--calibration-dir", skip_bad=True, reporter=reporter)
    elif "val_dir" in trained:
        images = list_images_of(None, "train", loaded, trained, skip_bad=True, cache_dir=cache_dir, reporter=reporter)
        directory, listing = images.directory, images.listing
    else:
        raise ConfigError(
            f"--calibration-dir is missing: {loaded.source} does not say which images it was trained on",
            code="calibration-dir-missing",
        )
    pixels = calibration_pixels(listing, loaded.network.preprocess, number, reporter)
    return Calibration(pixels, data_name(directory), listing.content_digest)
