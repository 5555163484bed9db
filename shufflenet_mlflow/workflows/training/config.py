"""From the options that were given to a complete configuration.

Options that were not given come from the checkpoint that is resumed, then from the network's family and the data.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.references import parse_reference
from shufflenet_mlflow.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MODEL,
    FIELDS,
    TrainConfig,
    format_numbers,
)
from shufflenet_mlflow.data.augment import AUGMENTATIONS
from shufflenet_mlflow.data.loader import default_workers
from shufflenet_mlflow.data.preprocess import REFERENCE_SIZE, Preprocess
from shufflenet_mlflow.data.sampler import MicroBatches, SampleOrder
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.models.loaded import choose_preprocess
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.models.torchvision_v2 import published_weights
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.training.loop import TrainData
from shufflenet_mlflow.training.recipe import get_recipe
from shufflenet_mlflow.workflows.training.data import absolute_path, image_folders, list_both
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import InitialWeights, ResumePoint

DISPLAY_INTERVAL = 20
VALIDATIONS = 10
"""By default a run is validated, and saved, about so often, and at most once per epoch."""

DIGITS_INPUT_SIZE = 64
DIGITS_EPOCHS = 20


@dataclass(frozen=True)
class Plan:
    """A training run with nothing left open."""

    config: TrainConfig
    architecture: ModelSpec
    data: TrainData


def plan(
    request: TrainRequest, start: ResumePoint | None, init: InitialWeights | None = None, world: World | None = None
) -> Plan:
    """Fill in what was not given, and list the data.

    Args:
        start: what is continued.
        init: what gives the first weights.
        world: the processes that share the work.

    Raises:
        ConfigError, ModelError: an option, or a combination of options, cannot work.
        DataError: the data cannot be used.
    """
    world = world or World()
    given = dict(request.options)
    inherited = start.config if start else dict(request.inherited)
    if "epochs" in given and "total_iters" in given:
        raise ConfigError(
            f"--epochs (={given['epochs']}) and --total-iters (={given['total_iters']}) exclude each other; "
            "give one of them",
            code="epochs-and-total-iters",
        )
    options = {**inherited, **given}
    train_dir, val_dir = image_folders(options)
    is_digits = train_dir is None
    if start is not None and options.get("model") != inherited.get("model"):
        options |= {"choices": given.get("choices"), "scales": given.get("scales")}  # those of another network
    architecture = init.architecture if init else ModelSpec.asked(options) or ModelSpec(DEFAULT_MODEL)
    if options.get("pretrained"):
        published_weights(architecture.name)
    recipe = get_recipe(architecture.name)
    augment = options.get("augment", "shift" if is_digits else recipe.augment)
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"--augment (={augment}) must be one of {', '.join(AUGMENTATIONS)}", code="augment-unknown")
    preprocess = choose_preprocess(
        architecture,
        options.get("input_size", DIGITS_INPUT_SIZE if is_digits else REFERENCE_SIZE),
        mean_image=_mean_image_to_read({**request.inherited, **given}, start),
        stored=Preprocess.from_dict(start.payload["preprocess"], repr(str(start.path))) if start is not None else None,
    )
    batch_size = options.get("batch_size", DEFAULT_BATCH_SIZE)
    if batch_size < 2:
        raise ConfigError(
            f"--batch-size (={batch_size}) must be at least 2: batch normalisation needs two images",
            code="batch-size-below-two",
        )
    micro_batches = _divide(batch_size, options.get("micro_batch_size"), world)
    on_bad_image = options.get("on_bad_image", "fail")
    train, val = list_both(train_dir, val_dir, skip_bad=on_bad_image == "skip", cache_dir=request.cache_dir)
    num_classes = options.get("num_classes", len(train.classes))
    if num_classes < len(train.classes):
        raise ConfigError(
            f"--num-classes (={num_classes}) is below the {len(train.classes)} classes of {str(train.root)!r}; "
            "raise it, or leave it out",
            code="num-classes-too-small",
        )
    seed = options.get("seed", 0)
    order = SampleOrder(len(train), batch_size, seed)
    epochs = DIGITS_EPOCHS if is_digits else recipe.epochs
    total_iters = _total_iters(given, inherited, order.iters_per_epoch, epochs)
    share = -(-batch_size // world.size)
    workers = 0 if is_digits else default_workers(len(train), share, preprocess.input_size)
    interval = max(1, -(-total_iters // (VALIDATIONS * order.iters_per_epoch))) * order.iters_per_epoch
    defaults = {
        "lr": recipe.scaled_lr(batch_size),
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
        "label_smooth": recipe.label_smooth,
        "workers": workers,
        "device": "auto",
        "display_interval": DISPLAY_INTERVAL,
        "val_interval": interval,
        "save_interval": interval,
        "micro_batch_size": None if world.size == 1 else share,
    }
    settled = {
        "model": architecture.name,
        "choices": format_numbers(architecture.choices) if architecture.choices else None,
        "scales": format_numbers(architecture.scales) if architecture.scales else None,
        "init_from": _absolute_reference(options.get("init_from")),
        "pretrained": options.get("pretrained", False),
        "mean_image": absolute_path(options.get("mean_image")),
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
    known = {name: value for name, value in options.items() if name in FIELDS}
    config = TrainConfig(**{**defaults, **known, **settled})
    return Plan(config, architecture, TrainData(train, val, order, micro_batches, preprocess))


def _total_iters(given: Mapping[str, Any], inherited: Mapping[str, Any], iters_per_epoch: int, epochs: int) -> int:
    """As given, in iterations or epochs, or else as inherited; by default `epochs`."""
    if "epochs" not in given and ("total_iters" in given or "total_iters" in inherited):
        total_iters: int = {**inherited, **given}["total_iters"]
    else:
        total_iters = given.get("epochs", epochs) * iters_per_epoch
    return total_iters


def _divide(batch_size: int, micro_batch_size: int | None, world: World) -> MicroBatches:
    """How each iteration's batch is divided among the processes.

    Raises:
        ConfigError: a part would be too small for batch normalisation.
    """
    micro_batches = MicroBatches.of(batch_size, max(2, micro_batch_size or batch_size), world.rank, world.size)
    if micro_batches.smallest < 2:
        several = micro_batches.accumulation_steps > 1
        way_out = "raise --micro-batch-size" if several else "begin with fewer processes"
        raise ConfigError(
            f"--batch-size (={batch_size}) is divided into {micro_batches.count} micro-batches, and batch "
            f"normalisation needs two images in each; raise it to {2 * micro_batches.count}, or {way_out}",
            code="micro-batch-too-small",
        )
    return micro_batches


def _mean_image_to_read(given: Mapping[str, Any], start: ResumePoint | None) -> str | None:
    """The file that `--mean-image` names; None where the image in the checkpoint is the same one.

    It is taken for the same if the file is gone: the same command, repeated, continues the run.
    """
    path: str | None = given.get("mean_image")
    if path is None or start is None or os.path.exists(path):
        return path
    return None if start.config.get("mean_image") == absolute_path(path) else path


def _absolute_reference(ref: str | None) -> str | None:
    """The reference, as it is understood from any folder."""
    return str(Path(ref).absolute()) if ref is not None and isinstance(parse_reference(ref), Path) else ref
