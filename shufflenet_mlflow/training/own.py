"""The parts of a training on data, network and optimizer of the user's own."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shufflenet_mlflow.checkpoints.loading import has_no_classes, head_of
from shufflenet_mlflow.checkpoints.names import FINAL_TAG, parse_name
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config import DEFAULT_MODEL, FIELDS, RunConfig, TrainConfig, option
from shufflenet_mlflow.data.own import LabelledImages, OwnImages
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.data.sampler import BalancedOrder, MicroBatches, SampleOrder
from shufflenet_mlflow.errors import ConfigError, ResumeError
from shufflenet_mlflow.runtime.devices import choose_device, move_model
from shufflenet_mlflow.training.changes import check_resumable
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.training.keeping import CheckpointStore, FolderStore, NoStore
from shufflenet_mlflow.training.recipe import check_warmup, recipe_options, run_defaults
from shufflenet_mlflow.training.state import TrainingState

OF_FILES = (
    *("choices", "scales", "init_from", "pretrained", "train_dir", "val_dir", "input_size", "mean_image", "augment"),
    *("on_bad_image", "erasing", "teacher", "qat", "val_fraction", "group_by", "sync_bn", "on_save_error"),
)
"""Options that only `train` has: of image files, of networks by name, and of what it keeps."""

OF_OPTIMIZER = ("lr", "momentum", "weight_decay", "optimizer", "head_lr_factor", "layer_decay")
"""Options that an optimizer of the user's own leaves without effect."""

_INPUT = Preprocess("bgr255", 32)
"""The preprocessing that changes nothing: a data set yields what the network takes."""


@dataclass(frozen=True)
class Parts:
    """A training that is put together, and where it goes on."""

    config: RunConfig
    data: TrainData
    state: TrainingState
    constants: Mapping[str, Any]
    store: CheckpointStore
    resumed_from: Path | None
    payload: Mapping[str, Any]
    """The checkpoint that it goes on from; empty without one."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to train."""
        name = parse_name(self.resumed_from.name) if self.resumed_from is not None else None
        was_ended = bool(self.payload.get("stop_reason")) or self.config.patience > 0
        is_long_enough = self.state.iters >= self.config.total_iters or was_ended
        return name is not None and name.tag == FINAL_TAG and is_long_enough


def put_together(
    model: nn.Module,
    train_set: LabelledImages,
    val_set: LabelledImages,
    config: TrainConfig,
    *,
    optimizer: Optimizer | None,
    classes: Sequence[str] | None,
    store: CheckpointStore | str | Path | None,
    resume: bool,
) -> Parts:
    """Return the parts of a training; arguments as for `Trainer`.

    Raises:
        ShuffleNetError: see `Trainer`.
    """
    _check_given(config, model, optimizer)
    names = classes if classes is not None else getattr(train_set, "classes", None)
    num_classes = _num_classes(config, model, names)
    names = list(names) if names is not None else [str(label) for label in range(num_classes)]
    train, val = OwnImages.of(train_set, names, "train_set"), OwnImages.of(val_set, names, "val_set")
    order = SampleOrder(len(train), config.batch_size, config.seed)
    decided = _decided(config, num_classes, model, order)
    if decided.balance != "none" and not train.knows_labels:
        raise ConfigError(
            f"--balance (={decided.balance}) needs all labels; give train_set an attribute targets, a list of them",
            code="balance-without-labels",
        )
    if decided.balance == "sampler":
        order = BalancedOrder(len(train), config.batch_size, config.seed, labels=train.samples.labels)
    device = choose_device(config.device)
    micro_batches = MicroBatches.of(config.batch_size, max(2, config.micro_batch_size or config.batch_size), 0, 1)
    state = TrainingState.of(decided, move_model(model, device), device, order.iters_per_epoch, optimizer=optimizer)
    stored = {name: value for name, value in decided.to_dict().items() if name not in OF_FILES}
    constants = {"config": stored, "class_to_idx": {name: label for label, name in enumerate(names)}}
    keeps = _store_of(store, config)
    found = keeps.newest() if resume else None
    payload = _resume(found, decided, stored, state, order) if found is not None else {}
    data = TrainData(train, val, order, micro_batches, _INPUT)
    return Parts(decided, data, state, constants, keeps, found, payload)


def _check_given(config: TrainConfig, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Refuse what would have no effect.

    Raises:
        ConfigError: the message names the option.
    """
    given = config.given()
    if foreign := [name for name in OF_FILES if name in given]:
        raise ConfigError(
            f"{option(foreign[0])} (={given[foreign[0]]}) is for train(); a Trainer is given network and data sets",
            code="option-not-of-trainer",
        )
    if optimizer is not None and (idle := [name for name in OF_OPTIMIZER if name in given]):
        raise ConfigError(
            f"{option(idle[0])} (={given[idle[0]]}) has no effect on an optimizer of your own; leave it out",
            code="option-of-optimizer",
        )
    if has_no_classes(model):
        raise ConfigError(
            "the network has no classifier (num_classes=0); build it with the number of classes",
            code="training-without-classifier",
        )
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise ConfigError("a Trainer trains in one process; train() does in several", code="trainer-in-processes")


def _num_classes(config: TrainConfig, model: nn.Module, classes: Sequence[str] | None) -> int:
    """Return the width of the classifier, as configuration, network or data set say.

    Raises:
        ConfigError: none of them does.
    """
    if config.num_classes is not None:
        return config.num_classes
    width = getattr(model, "num_classes", None)
    if not isinstance(width, int):
        head = head_of(model)
        width = getattr(model.get_submodule(head), "out_features", None) if head is not None else None
    if width is None:
        width = len(classes) if classes is not None else None
    if width is None:
        raise ConfigError("--num-classes is missing: neither network nor data set says it", code="num-classes-missing")
    return int(width)


def _decided(config: TrainConfig, num_classes: int, model: nn.Module, order: SampleOrder) -> RunConfig:
    """Return the configuration with every option decided; those `OF_FILES` are there, and mean nothing."""
    recipe = recipe_options(config.recipe, DEFAULT_MODEL, config.batch_size)
    total_iters = config.total_iters
    if total_iters is None:
        total_iters = (config.epochs or int(recipe["epochs"])) * order.iters_per_epoch
    values = {
        **dict.fromkeys(("choices", "scales", "init_from", "train_dir", "val_dir", "mean_image")),
        **run_defaults(recipe, total_iters, order.iters_per_epoch),
        "workers": 0,
        **{name: value for name, value in config.given().items() if name in FIELDS},
        "model": config.model or type(model).__name__,
        "num_classes": num_classes,
        "input_size": _INPUT.input_size,
        "total_iters": total_iters,
    }
    decided = RunConfig(**values)
    check_warmup(decided, order.iters_per_epoch)
    return decided


def _store_of(store: CheckpointStore | str | Path | None, config: TrainConfig) -> CheckpointStore:
    if store is None:
        return NoStore()
    if isinstance(store, (str, os.PathLike)):
        return FolderStore(store, Retention(config.keep_last, config.keep_best, config.keep_every))
    return store


def _resume(
    path: Path, decided: RunConfig, stored: Mapping[str, Any], state: TrainingState, order: SampleOrder
) -> dict[str, Any]:
    """Load the state of a checkpoint, if this training may go on from it.

    Raises:
        ResumeError: options, or the number of images, are others.
        CheckpointError: it is not of a training.
    """
    payload = read_checkpoint(path)
    before = payload.get("config")
    now = {**decided.to_dict(), **(before if isinstance(before, dict) else {})}
    check_resumable(now, decided, new_run=False, else_way_out="give another folder as store, or resume=False")
    sampler = payload.get("sampler_state", {})
    if sampler.get("num_samples", order.num_samples) != order.num_samples:
        raise ResumeError(
            f"train_set has {order.num_samples} images, and had {sampler['num_samples']} when {str(path)!r} was "
            "written; give the same, or another folder as store",
            code="dataset-size-changed",
        )
    state.load_state_dict(payload)
    return payload
