"""The images of a training run: listed, and compared with those of the checkpoint."""

from pathlib import Path

from shufflenet_mlflow.data.datasets import list_folder
from shufflenet_mlflow.data.folder import require_same_classes
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.sampler import SampleOrder
from shufflenet_mlflow.errors import ResumeError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.training.loop import TrainData
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Choices, stored_preprocess


def list_data(choices: Choices, cache_dir: Path | None, reporter: Reporter) -> TrainData:
    """List the training and validation images.

    Raises:
        DataError: a folder cannot be used, the two have different classes, or there are too few images.
    """
    train, val = (
        _list(choices, directory, part, cache_dir)
        for directory, part in ((choices.train_dir, "train"), (choices.val_dir, "val"))
    )
    require_same_classes(train.class_to_idx, val, expected_in=repr(str(train.root)), option="--val-dir")
    if len(train.classes) == 1:
        reporter.note(f"{str(train.root)!r} has one class only; a classifier needs at least two")
    if choices.train_dir is not None and choices.train_dir == choices.val_dir:
        reporter.warn("--train-dir and --val-dir are the same folder: validation says nothing about other images")
    order = SampleOrder(len(train), choices.batch_size, choices.seed)
    return TrainData(train, val, order, choices.micro_batches, choices.preprocess)


def _list(choices: Choices, directory: str | None, part: str, cache_dir: Path | None) -> ImageListing:
    return list_folder(directory, part, option=f"--{part}-dir", skip_bad=choices.skip_bad_images, cache_dir=cache_dir)


def check_same_data(attempt: Attempt, data: TrainData) -> None:
    """Refuse to continue on other images, or with another mean image, than the run began with; a fork may.

    Raises:
        DataError: the classes differ.
        ResumeError: the training images, or the mean images, differ.
    """
    point = attempt.resume_point
    if point is None:
        return
    if not attempt.is_fork and not data.preprocess.has_mean_of(stored_preprocess(point)):
        raise ResumeError(
            "--mean-image is not the one that the run began with; leave it out, or pass --new-run",
            code="mean-image-changed",
        )
    require_same_classes(
        point.payload["class_to_idx"],
        data.train,
        expected_in=f"the checkpoint {str(point.path)!r}",
        option="--train-dir",
    )
    before = point.payload.get("data", {}).get("train_digest")
    if not attempt.is_fork and isinstance(before, str) and before != data.train.digest:
        raise ResumeError(
            f"--train-dir {str(data.train.root)!r} does not hold the images that the run began with "
            f"(digest {data.train.digest[:8]}, then {before[:8]}); put them back, or pass --new-run",
            code="train-images-changed",
        )
