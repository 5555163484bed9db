"""What a training run was asked to do: plain values, checked where they are built.

No torch, mlflow or click is imported here, so that the command line can report wrong usage at once.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from shufflenet_mlflow.errors import ConfigError, ResumeError
from shufflenet_mlflow.runtime.signals import GRACE_SECONDS

DEFAULT_MODEL = "shufflenet_v2_x0_5"
DEFAULT_EXPERIMENT = "shufflenet"
DEFAULT_SAVE_ROOT = "models"
DEFAULT_BATCH_SIZE = 64


MAX_WORKERS = 1000
"""Processes that decode images: a slip of the keyboard must not fill the machine with them."""

Number = TypeVar("Number", int, float)

AMP_DTYPES = {"off": None, "bf16": "bfloat16", "fp16": "float16"}
"""What `--amp` can be -> PyTorch's name for the numbers that training computes with."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")

# A field's annotation -> what may stand in it. Whole numbers are welcome where a fraction may stand.
_TYPES: dict[str, tuple[type, ...]] = {
    "<class 'str'>": (str,),
    "<class 'int'>": (int,),
    "<class 'float'>": (float, int),
    "str | None": (str, type(None)),
    "<class 'bool'>": (bool,),
    "int | None": (int, type(None)),
    "float | None": (float, int, type(None)),
}


def default_cache_dir() -> Path:
    """Where remote checkpoints and the demo set are kept: `SHUFFLENET_CACHE_DIR`, or the user's cache."""
    chosen = os.environ.get("SHUFFLENET_CACHE_DIR")
    return Path(chosen) if chosen else platformdirs.user_cache_path("shufflenet-mlflow")


def option(name: str) -> str:
    """How the command line spells a field."""
    return "--" + name.replace("_", "-")


def command_of(config: Mapping[str, Any]) -> list[str]:
    """The options of `shufflenet train` that make a run of this configuration, all of them spelled out."""
    words = []
    for name, value in config.items():
        if name not in FIELDS:
            continue
        if value is True:
            words.append(option(name))
        elif value is not None and value is not False:
            words += [option(name), str(value)]
    return words


def _require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{option(field)} (={value}) must be {rule}", code=f"option-{field.replace('_', '-')}")


def parse_numbers(text: str, field: str, kind: type[Number]) -> tuple[Number, ...]:
    """The numbers in `text`, with commas or blanks between them and perhaps brackets around.

    Args:
        field: the option they come from, for the message.

    Raises:
        ConfigError: there is none, or one is no `kind`.
    """
    words = [word for word in re.split(r"[\s,]+", text.strip(" \t\n[]()")) if word]
    try:
        numbers = tuple(kind(word) for word in words)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(
            f"{option(field)} (={text}) must be {what} with commas between them", code="numbers-invalid"
        ) from error
    _require(bool(numbers), field, text, "numbers with commas between them")
    return numbers


def format_numbers(numbers: Iterable[float]) -> str:
    """The inverse of `parse_numbers`."""
    return ",".join(map(str, numbers))


def check_keep_rules(keep_last: int | None, keep_best: int | None, keep_every: int | None) -> None:
    """Raise ConfigError for a number that keeps nothing."""
    for name, value in (("keep_last", keep_last), ("keep_best", keep_best), ("keep_every", keep_every)):
        _require(value is None or value >= 1, name, value, "at least 1")


def check_job(job: str | None) -> None:
    """Raise ConfigError for a job's name that could not be a folder's."""
    fits = job is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", job) is not None
    _require(fits, "job", job, "letters, digits, dots, hyphens and underscores, at most 100")


def check_grace(grace: float | None) -> float:
    """The grace period in seconds, `GRACE_SECONDS` unless one is given.

    Raises:
        ConfigError: it is negative, or no number.
    """
    _require(grace is None or (math.isfinite(grace) and grace >= 0), "grace", grace, "at least 0")
    return GRACE_SECONDS if grace is None else grace


def check_device(device: str) -> None:
    """Raise ConfigError for a name that no machine could have."""
    _require(_DEVICE.fullmatch(device) is not None, "device", device, "auto, cpu, mps, cuda or cuda:N")


def check_types(values: Mapping[str, Any]) -> None:
    """Check the types of those values that are fields of `TrainConfig`.

    Raises:
        ConfigError: a value is of another type than its field.
    """
    for field in fields(TrainConfig):
        if field.name in values:
            value = values[field.name]
            expected = _TYPES[str(field.type)]
            _require(
                isinstance(value, expected) and (expected == (bool,) or not isinstance(value, bool)),
                field.name,
                repr(value),
                f"of type {' or '.join(kind.__name__ for kind in expected)}",
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run, with nothing left open: what is stored in its checkpoints and as `config.json`.

    Keys are the command line's options, with underscores.

    Raises:
        ConfigError: a value cannot work; the message names the option.
    """

    model: str
    """Name of the network."""
    choices: str | None
    """Branch of each of the network's units, as numbers with commas between them; None: the published ones."""
    scales: str | None
    """Width of each of the network's units, likewise."""
    init_from: str | None
    """Reference of the checkpoint whose weights training begins with, absolute; None: freshly drawn ones."""
    pretrained: bool
    """Begin with the weights that torchvision publishes."""
    train_dir: str | None
    """Folder of training images, absolute; None means the bundled digits."""
    val_dir: str | None
    """Folder of validation images, absolute; None means the bundled digits."""
    num_classes: int
    """Width of the classifier, at least the number of classes in the folder."""
    input_size: int
    """Height and width of the network's input, pixels."""
    batch_size: int
    """Images per iteration."""
    total_iters: int
    """Iterations in the whole run."""
    lr: float
    """Learning rate at the first iteration; it falls linearly to 0."""
    momentum: float
    """Of SGD."""
    weight_decay: float
    """On weights of two or more dimensions."""
    label_smooth: float
    """Share of the target that is spread over all classes."""
    seed: int
    """Of everything random."""
    mean_image: str | None
    """File of the mean image that is subtracted from the input, absolute; None: a mean per channel, if any. The image
    itself is in each checkpoint."""
    augment: str
    """Name of the training augmentation."""
    on_bad_image: str
    """What an unreadable file means: `fail` or `skip`."""
    workers: int
    """Processes that decode images; 0 decodes in the training process."""
    device: str
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N`."""
    display_interval: int
    """Iterations between two lines of progress and two metric points."""
    val_interval: int
    """Iterations between two passes over the validation set."""
    save_interval: int
    """Iterations between two checkpoints."""
    keep_last: int | None = None
    """Keep the newest so many checkpoints; see `shufflenet_mlflow.checkpoint.Retention`. With no rule, all are kept."""
    keep_best: int | None = None
    """Keep so many with the highest validation accuracy."""
    keep_every: int | None = None
    """Keep those whose iteration is a multiple of this."""
    on_save_error: str = "fail"
    """What a checkpoint that cannot be written means: `fail` or `continue`."""
    ema_decay: float | None = None
    """Keep a moving average of the weights, of which each iteration leaves this much; None: none. Where there is one,
    accuracies are of it."""
    micro_batch_size: int | None = None
    """At most so many images per forward pass, which batch normalisation sees together; None: the whole batch."""
    sync_bn: bool = False
    """Batch normalisation sees the images of all processes together; needs CUDA."""
    amp: str = "off"
    """Mixed precision in training: `off`, `bf16`, or `fp16` with a loss scaler. Evaluation is in full precision."""
    compile: bool = False
    """Train with what `torch.compile` makes of the network: other rounding, minutes of preparation, then maybe faster
    steps."""

    def __post_init__(self) -> None:
        check_types(self.to_dict())
        for name in (
            "num_classes",
            "batch_size",
            "total_iters",
            "display_interval",
            "val_interval",
            "save_interval",
        ):
            value = getattr(self, name)
            _require(value >= 1, name, value, "at least 1")
        _require(
            self.input_size >= 32 and self.input_size % 32 == 0,
            "input_size",
            self.input_size,
            "a multiple of 32, at least 32",
        )
        _require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "above 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            self.weight_decay,
            "at least 0",
        )
        _require(0 <= self.label_smooth < 1, "label_smooth", self.label_smooth, "at least 0 and below 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2**63")
        _require(0 <= self.workers <= MAX_WORKERS, "workers", self.workers, f"from 0 to {MAX_WORKERS}")
        check_device(self.device)
        _require(self.on_bad_image in ("fail", "skip"), "on_bad_image", self.on_bad_image, "fail or skip")
        check_keep_rules(self.keep_last, self.keep_best, self.keep_every)
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "above 0 and below 1")
        _require(
            self.micro_batch_size is None or self.micro_batch_size >= 2,
            "micro_batch_size",
            self.micro_batch_size,
            "at least 2: batch normalisation needs two images",
        )
        _require(self.amp in AMP_DTYPES, "amp", self.amp, "off, bf16 or fp16")
        _require(self.on_save_error in ("fail", "continue"), "on_save_error", self.on_save_error, "fail or continue")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field."""
        return asdict(self)


FIELDS = tuple(field.name for field in fields(TrainConfig))

FORK_MAY_NOT_CHANGE = ("model", "choices", "scales", "init_from", "pretrained", "num_classes", "seed", "batch_size")
"""Changing one of these makes a checkpoint's continuation meaningless."""

RESUME_MAY_CHANGE = (
    "train_dir",
    "val_dir",
    "mean_image",
    "workers",
    "device",
    "display_interval",
    "val_interval",
    "save_interval",
    "on_bad_image",
    "keep_last",
    "keep_best",
    "keep_every",
    "on_save_error",
)
"""These may change when a run is resumed; the content of the data and of the mean image is compared on its own."""


def drift(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs: name -> (before, now). A field that was not there yet counts only if it is set now."""
    return {
        name: (before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value and (name in before or value)
    }


def check_resumable(before: Mapping[str, Any], now: TrainConfig, *, new_run: bool) -> None:
    """Refuse options that would make a resumed run another run than it was.

    Args:
        before: the configuration of the run, or of its checkpoint.
        new_run: the continuation is a run of its own, in which anything but `FORK_MAY_NOT_CHANGE` may change.

    Raises:
        ResumeError: an option changed that may not; the message names it, both values and the way out.
    """
    changed = {name: pair for name, pair in drift(before, now.to_dict()).items() if name not in RESUME_MAY_CHANGE}
    breaking = {name: pair for name, pair in changed.items() if name in FORK_MAY_NOT_CHANGE}
    refused = breaking or ({} if new_run else changed)
    if refused:
        listed = ", ".join(f"{option(name)} ({was} -> {is_})" for name, (was, is_) in refused.items())
        way_out = (
            "leave them out, or train anew with --resume none and another --save-dir"
            if breaking
            else "leave them as they were, or pass --new-run to continue as a run of its own"
        )
        raise ResumeError(
            f"the run cannot be continued with changed {listed}; {way_out}", code="resume-options-changed"
        )
