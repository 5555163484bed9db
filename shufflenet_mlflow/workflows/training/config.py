"""From the options that were given to a complete configuration.

Options that were not given come from the run that is resumed, then from the network's family and the data.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.references import parse_reference
from shufflenet_mlflow.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MODEL,
    DEFAULTS,
    FIELDS,
    FIXED_DEFAULTS,
    RunConfig,
    check_batch_to_train,
    check_rule,
    format_numbers,
)
from shufflenet_mlflow.data.loader import default_workers
from shufflenet_mlflow.data.preprocess import REFERENCE_SIZE, Preprocess
from shufflenet_mlflow.data.sampler import MicroBatches
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.models.catalog import VARIANTS, check_network, check_published
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.models.entry_points import Registration
from shufflenet_mlflow.models.loaded import choose_preprocess, describe
from shufflenet_mlflow.models.parts import check_divisible
from shufflenet_mlflow.models.registered import check_runs
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.devices import choose_device
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.runtime.threads import default_threads
from shufflenet_mlflow.training.changes import check_resumable
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.training.recipe import QAT_RECIPE, check_warmup, recipe_options, run_defaults
from shufflenet_mlflow.workflows.options import check_folders
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import ResumePoint

DIGITS_INPUT_SIZE = 64
DIGITS_EPOCHS = 20


@dataclass(frozen=True)
class Choices:
    """Everything about a training run that can be settled before its images are listed."""

    options: Mapping[str, Any]
    """Given or inherited; see `Attempt.options`."""
    given: Mapping[str, Any]
    spec: ModelSpec
    recipe_name: str
    recipe: Mapping[str, Any]
    """The options that the recipe decides; see `recipe_options`."""
    preprocess: Preprocess
    train_dir: str | None
    """Absolute; None for the bundled digits, as in `val_dir`."""
    val_dir: str | None
    augment: str
    batch_size: int
    micro_batches: MicroBatches
    goes_on: bool
    """Whether a checkpoint is continued, whose threads, if they are known, are kept: rounding depends on them."""

    @property
    def is_digits(self) -> bool:
        """Whether the run trains on the bundled digits."""
        return self.train_dir is None

    @property
    def skip_bad_images(self) -> bool:
        """Whether unreadable images are skipped."""
        return bool(self.options.get("on_bad_image") == "skip")

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return int(self.options.get("seed", FIXED_DEFAULTS["seed"]))


@dataclass(frozen=True)
class Plan:
    """A training run with nothing left open."""

    config: RunConfig
    spec: ModelSpec
    data: TrainData
    data_changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """How the images differ from those of the checkpoint: name -> (then, now)."""


def choose(request: TrainRequest, attempt: Attempt, world: World) -> Choices:
    """Settle network, preprocessing, folders, augmentation and batches.

    Raises:
        ConfigError, ModelError: an option, or a combination of options, cannot work.
        DataError: the mean image cannot be read.
    """
    given = dict(request.options)
    point = attempt.resume_point
    options = attempt.options(request)
    if point is not None and options.get("model") != point.config.get("model"):
        options |= {"choices": given.get("choices"), "scales": given.get("scales")}  # the old ones are another model's
    options |= _sides_given(given)
    weights = attempt.initial_weights
    is_qat = options.get("qat") is not None
    spec = weights.spec if weights is not None else replace(_spec_of(options, point), fake_quantized=is_qat)
    if options.get("pretrained"):
        check_published(spec.name)
    check_network({"model": spec.name, "compile": options.get("compile")})
    train_dir, val_dir = image_folders(options)
    batch_size = options.get("batch_size", DEFAULT_BATCH_SIZE)
    check_batch_to_train(batch_size)
    name = options.get("recipe", QAT_RECIPE if is_qat else DEFAULTS["recipe"])
    check_rule("recipe", name)  # a strange checkpoint's may be anything, and so may its batches and augmentation
    recipe = recipe_options(name, spec.name, batch_size, options.get("epochs"))
    augment = options.get("augment", "shift" if train_dir is None else recipe["augment"])
    check_rule("augment", augment)
    check_divisible(
        spec, str(options.get("freeze", recipe["freeze"])), options.get("layer_decay", recipe["layer_decay"])
    )
    preprocess = _choose_preprocess(options, given, attempt, spec, is_digits=train_dir is None)
    if isinstance(network := spec.network, Registration):
        check_runs(network, spec.name, spec.arguments, preprocess.input_size)
    return Choices(
        options,
        given,
        spec,
        name,
        recipe,
        preprocess,
        train_dir,
        val_dir,
        augment,
        batch_size,
        _micro_batches(batch_size, options.get("micro_batch_size"), world),
        goes_on=point is not None,
    )


def complete_config(choices: Choices, data: TrainData, world: World) -> RunConfig:
    """Return the whole configuration, now that the images are known.

    Raises:
        ConfigError: an option cannot work, alone or with these images.
    """
    options, train = choices.options, data.train
    num_classes = options.get("num_classes", len(train.classes))
    if num_classes < len(train.classes):
        raise ConfigError(
            f"--num-classes (={num_classes}) is below the "
            f"{counted(len(train.classes), 'class', 'classes')} of {str(train.source)!r}; "
            "raise it, or leave it out",
            code="num-classes-too-small",
        )
    iters_per_epoch = data.order.iters_per_epoch
    total_iters = _total_iters(choices, iters_per_epoch)
    share = -(-choices.batch_size // world.size)
    workers = 0 if choices.is_digits else default_workers(len(train), share, choices.preprocess.input_size)
    defaults = {
        **run_defaults(choices.recipe, total_iters, iters_per_epoch),
        "workers": workers,
        "threads": _threads(choices, num_classes),
        "micro_batch_size": None if world.size == 1 else share,
    }
    settled = {
        "model": choices.spec.name,
        "choices": format_numbers(choices.spec.choices) if choices.spec.choices else None,
        "scales": format_numbers(choices.spec.scales) if choices.spec.scales else None,
        "init_from": _absolute_reference(options.get("init_from")),
        "teacher": _absolute_reference(options.get("teacher")),
        "qat": _absolute_reference(options.get("qat")),
        "recipe": choices.recipe_name,
        "pretrained": options.get("pretrained", False),
        "mean_image": absolute_path(options.get("mean_image")),
        "train_dir": choices.train_dir,
        "val_dir": choices.val_dir,
        "val_fraction": None if data.division is None else data.division.val_fraction,
        "group_by": None if data.division is None else data.division.group_by,
        "num_classes": num_classes,
        "input_size": choices.preprocess.input_size,
        "batch_size": choices.batch_size,
        "total_iters": total_iters,
        "seed": choices.seed,
        "augment": choices.augment,
    }
    known = {name: value for name, value in options.items() if name in FIELDS}
    config = RunConfig(**{**defaults, **known, **settled})
    check_warmup(config, iters_per_epoch)
    return config


def _threads(choices: Choices, num_classes: int) -> int | None:
    """Return how many threads a new run computes with on a CPU; None: as PyTorch does."""
    device = choices.options.get("device", "auto")
    if choices.goes_on or device not in ("auto", "cpu") or choose_device(device).type != "cpu":
        return None
    size = choices.preprocess.input_size
    cost = model_cost(choices.spec.name, num_classes, size, **choices.spec.kwargs())
    return default_threads(cost.macs * choices.micro_batches.smallest)


def _spec_of(options: Mapping[str, Any], point: ResumePoint | None) -> ModelSpec:
    """Return the network of the run; one of another package may have arguments for which there are no options."""
    model = options.get("model")
    if point is not None and model == point.config.get("model") and model not in VARIANTS:
        described = describe(point.payload, repr(str(point.path))).spec
        if described is not None:
            return described
    return ModelSpec.from_options(options) or ModelSpec(DEFAULT_MODEL)


def check_continuation(attempt: Attempt, config: RunConfig) -> None:
    """Refuse options that would make another run of the one that is continued, or started again.

    Raises:
        ResumeError: an option changed that may not.
    """
    if attempt.inherited:
        check_resumable(attempt.inherited, config, new_run=False)
    if attempt.resume_point is not None:
        check_resumable(attempt.resume_point.config, config, new_run=attempt.is_fork)


def _sides_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what no longer holds of an inherited configuration, now that validation images come from elsewhere."""
    if given.get("val_dir") is not None:
        return {"val_fraction": None, "group_by": None}
    divides = given.get("val_fraction") is not None or given.get("group_by") is not None
    return {"val_dir": None} if divides else {}


def image_folders(options: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the absolute folders or tables of training and validation images.

    Two None mean the bundled digits; one for validation, that the training images are divided.

    Raises:
        ConfigError: the training images are not given, but something about their validation is.
    """
    check_folders(options)
    return absolute_path(options.get("train_dir")), absolute_path(options.get("val_dir"))


def absolute_path(path: Any) -> str | None:
    """Return the path as it is understood from any folder, without `..` unless a link makes that another one."""
    if path is None:
        return None
    short = os.path.abspath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else str(Path(path).absolute())


def _absolute_reference(ref: str | None) -> str | None:
    """Return the reference as it is understood from any folder."""
    return str(Path(ref).absolute()) if ref is not None and isinstance(parse_reference(ref), Path) else ref


def _choose_preprocess(
    options: Mapping[str, Any], given: Mapping[str, Any], attempt: Attempt, spec: ModelSpec, *, is_digits: bool
) -> Preprocess:
    point, weights = attempt.resume_point, attempt.initial_weights
    stored = stored_preprocess(point) if point is not None else None
    usual = spec.preprocess.input_size
    usual = DIGITS_INPUT_SIZE if is_digits and usual == REFERENCE_SIZE else usual
    described = weights.description.preprocess if weights is not None else None
    if described is not None and not is_digits:
        usual = described.input_size
    if described is not None and spec.fake_quantized:
        stored, usual = described, described.input_size  # it stays the network that it is
    return choose_preprocess(
        spec,
        options.get("input_size", usual),
        mean_image=_mean_image_to_read({**attempt.inherited, **given}, point),
        stored=stored,
    )


def stored_preprocess(point: ResumePoint) -> Preprocess:
    """Return the preprocessing that a checkpoint was trained with.

    Raises:
        CheckpointError: it is not understood.
    """
    return Preprocess.from_dict(point.payload["preprocess"], repr(str(point.path)))


def _mean_image_to_read(given: Mapping[str, Any], point: ResumePoint | None) -> str | None:
    """Return the file that `--mean-image` names; None where the image in the checkpoint is used.

    A file that is gone is taken for the one in the checkpoint, so that repeating a command continues its run.
    """
    path: str | None = given.get("mean_image")
    if path is None or point is None or os.path.exists(path):
        return path
    return None if point.config.get("mean_image") == absolute_path(path) else path


def _micro_batches(batch_size: int, micro_batch_size: int | None, world: World) -> MicroBatches:
    """Divide each iteration's batch among the processes.

    Raises:
        ConfigError: a micro-batch would be too small for batch normalisation.
    """
    micro_batches = MicroBatches.of(batch_size, max(2, micro_batch_size or batch_size), world.rank, world.size)
    if micro_batches.smallest < 2:
        several = micro_batches.accumulation_steps > 1
        way_out = "raise --micro-batch-size" if several else "start fewer processes"
        raise ConfigError(
            f"--batch-size (={batch_size}) is divided into {micro_batches.count} micro-batches, and batch "
            f"normalisation needs two images in each; raise it to {2 * micro_batches.count}, or {way_out}",
            code="micro-batch-too-small",
        )
    return micro_batches


def _total_iters(choices: Choices, iters_per_epoch: int) -> int:
    """Return the run's length as given, in iterations or epochs, or else as inherited, or else the recipe's."""
    if "epochs" not in choices.given and "total_iters" in choices.options:
        return int(choices.options["total_iters"])
    epochs = DIGITS_EPOCHS if choices.is_digits else choices.recipe["epochs"]
    return int(choices.given.get("epochs", epochs)) * iters_per_epoch
