"""The images of a training run: listed, and compared with those of the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shufflenet_mlflow.data.datasets import list_folder
from shufflenet_mlflow.data.folder import require_same_classes
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.errors import ConfigError, ResumeError
from shufflenet_mlflow.training.loop import TrainData
from shufflenet_mlflow.workflows.training.resume import ResumePoint


def image_folders(options: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Those of the images to train and to validate on; None and None for the bundled digits.

    Raises:
        ConfigError: only one of them is given.
    """
    train_dir, val_dir = absolute_path(options.get("train_dir")), absolute_path(options.get("val_dir"))
    if (train_dir is None) != (val_dir is None):
        lacking = "--val-dir" if val_dir is None else "--train-dir"
        raise ConfigError(
            f"{lacking} is missing; give both folders, or neither for the bundled digits", code="one-folder-missing"
        )
    return train_dir, val_dir


def list_both(
    train_dir: str | None, val_dir: str | None, *, skip_bad: bool, cache_dir: Path | None
) -> tuple[ImageListing, ImageListing]:
    """The images to train and to validate on.

    Raises:
        DataError: see `list_folder`; or the two have different classes.
    """
    train, val = (
        list_folder(directory, part, option=f"--{part}-dir", skip_bad=skip_bad, cache_dir=cache_dir)
        for directory, part in ((train_dir, "train"), (val_dir, "val"))
    )
    require_same_classes(train.class_to_idx, val, expected_in=repr(str(train.root)), option="--val-dir")
    return train, val


def check_same_data(start: ResumePoint, data: TrainData, *, new_run: bool) -> None:
    """Refuse to continue on other images, or with another mean image, than the run began with.

    Args:
        new_run: the continuation is a run of its own, whose images may differ, if not its classes.

    Raises:
        DataError: the classes differ.
        ResumeError: the training images, or the mean images, differ.
    """
    stored = Preprocess.from_dict(start.payload["preprocess"], repr(str(start.path)))
    if not new_run and not data.preprocess.has_mean_of(stored):
        raise ResumeError(
            "--mean-image is not the one that the run began with; leave it out, or pass --new-run",
            code="mean-image-changed",
        )
    require_same_classes(
        start.payload["class_to_idx"],
        data.train,
        expected_in=f"the checkpoint {str(start.path)!r}",
        option="--train-dir",
    )
    before = start.payload.get("data", {}).get("train_digest")
    if not new_run and isinstance(before, str) and before != data.train.digest:
        raise ResumeError(
            f"--train-dir {str(data.train.root)!r} does not hold the images that the run began with "
            f"(digest {data.train.digest[:8]}, then {before[:8]}); put them back, or pass --new-run",
            code="train-images-changed",
        )


def absolute_path(directory: Any) -> str | None:
    return None if directory is None else str(Path(directory).absolute())
