"""From the options that were given to a complete configuration.

Options that were not given come from the checkpoint that is resumed, then from the network's family and the data.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shufflenet_mlflow.checkpoint import FINAL_TAG, RESUME_KEYS, check_payload, parse_name, read_checkpoint
from shufflenet_mlflow.config import DEFAULT_MODEL, FIELDS, TrainConfig, check_device, check_types, default_cache_dir
from shufflenet_mlflow.data.digits import cached_digits
from shufflenet_mlflow.data.folder import (
    ImageListing,
    list_images,
    require_images_only,
    require_same_classes,
)
from shufflenet_mlflow.data.preprocess import AUGMENTATIONS, Preprocess
from shufflenet_mlflow.data.sampler import SampleOrder
from shufflenet_mlflow.errors import CheckpointError, ConfigError, ResumeError
from shufflenet_mlflow.models import get_variant
from shufflenet_mlflow.recipe import get_recipe
from shufflenet_mlflow.resolve import newest_valid, resolve
from shufflenet_mlflow.train import TrainData

BATCH_SIZE = 64
INPUT_SIZE = 224
MOST_WORKERS = 4
DISPLAY_INTERVAL = 20
VALIDATIONS = 10
"""By default a run is validated, and saved, about so often, and at most once per epoch."""

DIGITS_INPUT_SIZE = 64
DIGITS_EPOCHS = 20
DIGITS_NAME = "digits"


@dataclass(frozen=True)
class TrainRequest:
    """What a user asked for."""

    options: Mapping[str, Any]
    """Fields of `TrainConfig`, and `epochs`; only those that were given."""
    resume: str = "auto"
    """`auto`, `none` or a checkpoint reference."""
    new_run: bool = False
    save_dir: Path | None = None
    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Start:
    """The checkpoint that training continues from."""

    path: Path
    payload: Mapping[str, Any]
    in_cache: bool
    """It was fetched from a run; otherwise it lies where it was found on the disk."""

    @property
    def iters(self) -> int:
        return int(self.payload["iters"])

    @property
    def run_id(self) -> str | None:
        run_id: str | None = self.payload["run_id"]
        return run_id

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.payload["config"])

    @property
    def best_top1(self) -> float | None:
        """The best validation accuracy up to here."""
        best = self.payload.get("best")
        return best["val_top1"] if best else None

    @property
    def is_best(self) -> bool:
        """Whether that was the accuracy of this very state."""
        return self.best_top1 is not None and self.payload["best"]["iters"] == self.iters

    def is_final(self, total_iters: int) -> bool:
        """Whether nothing is left to do."""
        name = parse_name(self.path.name)
        return name is not None and name.tag == FINAL_TAG and self.iters >= total_iters


def find_start(request: TrainRequest) -> Start | None:
    """The checkpoint to continue from; None for a fresh start.

    Raises:
        ResumeError: the folder holds another run's checkpoints, or the checkpoint holds weights only.
        UnresolvedError, CheckpointError, TrackingError: the reference could not be resolved.
    """
    directory = request.save_dir
    found = newest_valid(directory) if directory is not None else None
    if request.resume == "none":
        if found is not None:
            raise ResumeError(
                f"--save-dir {str(directory)!r} holds checkpoints already; --resume auto continues them, "
                "another --save-dir begins anew"
            )
        return None
    if request.resume == "auto":
        if found is None:
            return None
        if request.new_run:
            raise ResumeError(
                f"--save-dir {str(directory)!r} holds the run's own checkpoints; for a fork pass "
                f"--resume {directory} and another --save-dir"
            )
        return _load_start(found.path, in_cache=False)
    resolved = resolve(request.resume, tracking_uri=request.tracking_uri, cache_dir=request.cache_dir)
    start = _load_start(resolved.path, in_cache=resolved.run_id is not None)
    if found is not None:
        there = read_checkpoint(found.path).get("run_id")
        if request.new_run or there != start.run_id:
            raise ResumeError(f"--save-dir {str(directory)!r} holds checkpoints of run {there}; name another folder")
    return start


def _load_start(path: Path, *, in_cache: bool) -> Start:
    payload = read_checkpoint(path)
    source = repr(str(path))
    check_payload(payload, RESUME_KEYS, source)
    try:
        check_types(payload["config"])
    except ConfigError as error:
        raise CheckpointError(f"{source}: its configuration is not understood: {error}") from error
    return Start(path, payload, in_cache)


def choose_device(device: str) -> torch.device:
    """The device that `auto`, `cpu`, `mps`, `cuda` or `cuda:N` means here.

    Raises:
        ConfigError: there is no such device.
    """
    check_device(device)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: there is no Apple GPU here; use auto or cpu")
    return chosen


def data_name(directory: str | None) -> str:
    """What to call a data set: its folder's name, or the one above a folder called train or val."""
    if directory is None:
        return DIGITS_NAME
    path = Path(directory)
    generic = ("train", "training", "val", "valid", "validation", "test")
    return path.parent.name if path.name.lower() in generic and path.parent.name else path.name


def list_folder(
    directory: str | None, part: str, *, option: str, skip_bad: bool, cache_dir: Path | None
) -> ImageListing:
    """List `directory`, or that part of the bundled digits.

    Raises:
        DataError: see `list_images`; or it holds other files than images, and `skip_bad` is False.
    """
    if directory is None:
        return list_images(cached_digits(cache_dir or default_cache_dir()) / part)
    listing = list_images(directory, option=option)
    if not skip_bad:
        require_images_only(listing, option=option)
    return listing


def _absolute(directory: Any) -> str | None:
    return None if directory is None else str(Path(directory).absolute())


def plan(request: TrainRequest, start: Start | None) -> tuple[TrainConfig, TrainData]:
    """Fill in what was not given, and list the data.

    Raises:
        ConfigError, ModelError: an option, or a combination of options, cannot work.
        DataError: the data cannot be used.
    """
    given = dict(request.options)
    inherited = start.config if start else {}
    if "epochs" in given and "total_iters" in given:
        raise ConfigError("--epochs and --total-iters exclude each other; give one of them")
    options = {**inherited, **given}
    train_dir, val_dir = _absolute(options.get("train_dir")), _absolute(options.get("val_dir"))
    if (train_dir is None) != (val_dir is None):
        lacking = "--val-dir" if val_dir is None else "--train-dir"
        raise ConfigError(f"{lacking} is missing; give both folders, or neither for the bundled digits")
    model = options.get("model", DEFAULT_MODEL)
    variant = get_variant(model)
    augment = options.get("augment", "shift" if train_dir is None else "release")
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"--augment (={augment}) must be one of {', '.join(AUGMENTATIONS)}")
    preprocess = Preprocess(
        variant.preprocess,
        options.get("input_size", DIGITS_INPUT_SIZE if train_dir is None else INPUT_SIZE),
    )
    batch_size = options.get("batch_size", BATCH_SIZE)
    if batch_size < 2:
        raise ConfigError(f"--batch-size (={batch_size}) must be at least 2: batch normalisation needs two images")
    on_bad_image = options.get("on_bad_image", "fail")

    train, val = (
        list_folder(
            directory,
            part,
            option=f"--{part}-dir",
            skip_bad=on_bad_image == "skip",
            cache_dir=request.cache_dir,
        )
        for directory, part in ((train_dir, "train"), (val_dir, "val"))
    )
    require_same_classes(train.class_to_idx, val, expected_in=repr(str(train.root)), option="--val-dir")
    num_classes = options.get("num_classes", len(train.classes))
    if num_classes < len(train.classes):
        raise ConfigError(
            f"--num-classes (={num_classes}) is below the {len(train.classes)} classes of {str(train.root)!r}"
        )
    seed = options.get("seed", 0)
    order = SampleOrder(len(train), batch_size, seed)
    recipe = get_recipe(model)
    epoch = order.iters_per_epoch
    if "total_iters" in given or ("total_iters" in inherited and "epochs" not in given):
        total_iters = options["total_iters"]
    else:
        default = DIGITS_EPOCHS if train_dir is None else recipe.epochs
        total_iters = given.get("epochs", default) * epoch
    interval = max(1, -(-total_iters // (VALIDATIONS * epoch))) * epoch
    config = TrainConfig(
        **{
            "lr": recipe.scaled_lr(batch_size),
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
            "label_smooth": recipe.label_smooth,
            "workers": 0 if train_dir is None else min(MOST_WORKERS, os.cpu_count() or 1),
            "device": "auto",
            "display_interval": DISPLAY_INTERVAL,
            "val_interval": interval,
            "save_interval": interval,
            **{name: value for name, value in options.items() if name in FIELDS},
            "model": model,
            "train_dir": train_dir,
            "val_dir": val_dir,
            "num_classes": num_classes,
            "input_size": preprocess.input_size,
            "batch_size": batch_size,
            "total_iters": total_iters,
            "seed": seed,
            "augment": augment,
            "on_bad_image": on_bad_image,
        }
    )
    return config, TrainData(train, val, order, preprocess)


def check_same_data(start: Start, data: TrainData, *, new_run: bool) -> None:
    """Refuse to continue on other images than the run began with.

    Args:
        new_run: the continuation is a run of its own, whose images may differ, if not its classes.

    Raises:
        DataError: the classes differ.
        ResumeError: the training images differ.
    """
    require_same_classes(
        start.payload["class_to_idx"],
        data.train,
        expected_in=f"the checkpoint {str(start.path)!r}",
        option="--train-dir",
    )
    before = start.payload.get("data", {}).get("train_digest")
    if not new_run and before is not None and before != data.train.digest:
        raise ResumeError(
            f"--train-dir {str(data.train.root)!r} does not hold the images that the run began with "
            f"(digest {data.train.digest[:8]}, then {before[:8]}); put them back, or pass --new-run"
        )
