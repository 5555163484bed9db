"""Configuration of a training run, and the rules that an option's value must keep.

No torch, mlflow or click is imported here, so that the command line can report wrong usage at once.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import platformdirs

from shufflenet_mlflow.errors import ConfigError

DEFAULT_MODEL = "shufflenet_v2_x0_5"
DEFAULT_EXPERIMENT = "shufflenet"
DEFAULT_SAVE_ROOT = "models"
DEFAULT_BATCH_SIZE = 64


MAX_WORKERS = 1000
"""Most processes that decode images: a typing error must not fill the machine with them."""
MOST_CLASSES = 1_000_000
"""A classifier this wide takes gigabytes; more is a typing error."""
MOST_ROWS = 50_000
"""MLflow returns no more runs at a time."""
STRIDE = 32
"""Every network of the series halves its input five times."""
LARGEST_INPUT = 7168
"""An image that is resized for a larger input would exceed `LARGEST_RESIZED`."""

Number = TypeVar("Number", int, float)

AMP_DTYPES = {"off": None, "bf16": "bfloat16", "fp16": "float16"}
"""Value of `--amp` -> PyTorch's name of the numbers that training computes with."""
AUGMENT_NAMES = ("release", "lighting", "shift", "none")
ON_BAD_IMAGE = ("fail", "skip")
ON_SAVE_ERROR = ("fail", "continue")
LOG_TO = ("source", "new", "none")
EXPORT_FORMATS = ("pt2", "onnx", "mlflow")
MEAN_IMAGE_SUFFIXES = (".npy", ".xml")


def default_cache_dir() -> Path:
    """Return the folder of fetched checkpoints and of the demo set: `SHUFFLENET_CACHE_DIR`, or the user's cache."""
    chosen = os.environ.get("SHUFFLENET_CACHE_DIR")
    return Path(chosen) if chosen else platformdirs.user_cache_path("shufflenet-mlflow")


def option(name: str) -> str:
    """Return a field's name as the command line spells it."""
    return "--" + name.replace("_", "-")


def command_of(config: Mapping[str, Any]) -> list[str]:
    """Return the options of `shufflenet train` that repeat this configuration, every one of them explicit."""
    words = []
    for name, value in config.items():
        if name not in FIELDS:
            continue
        if value is True:
            words.append(option(name))
        elif value is not None and value is not False:
            words += [option(name), str(value)]
    return words


def _require(condition: bool, field: str, value: object, rule: str, code: str | None = None) -> None:
    if not condition:
        code = code or f"option-{field.replace('_', '-')}"
        raise ConfigError(f"{option(field)} (={value}) must be {rule}", code=code)


def parse_numbers(text: str, field: str, kind: type[Number]) -> tuple[Number, ...]:
    """Return the numbers in `text`, separated by commas or blanks; brackets around them are ignored.

    Args:
        field: the option they come from, for the message.

    Raises:
        ConfigError: there are none, or one is not a `kind`.
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
    """Return the text that `parse_numbers` reads."""
    return ",".join(map(str, numbers))


class Rule(NamedTuple):
    """A condition on an option's value that neither data nor a checkpoint can change."""

    text: str
    """Completes "--lr (=0) must be …"."""
    holds: Callable[[Any], bool]
    code: str | None = None
    """By default `option-` and the option's name."""


def _between(low: int, high: int) -> Rule:
    return Rule(f"from {low} to {high}", lambda number: low <= number <= high)


def _one_of(words: Iterable[str]) -> Rule:
    words = tuple(words)
    return Rule(" or ".join((", ".join(words[:-1]), words[-1])), lambda word: word in words)


def _match(pattern: str, text: str, code: str | None = None) -> Rule:
    return Rule(text, lambda value: re.fullmatch(pattern, value) is not None, code)


_COUNT = Rule("at least 1 and at most 10**12", lambda number: 1 <= number <= 10**12)
_SHARE = Rule("at least 0 and below 1", lambda number: 0 <= number < 1)

RULES: dict[str, Rule] = {
    "num_classes": Rule(f"at least 1 and at most {MOST_CLASSES}", lambda number: 1 <= number <= MOST_CLASSES),
    "input_size": Rule(
        f"a multiple of {STRIDE}, from {STRIDE} to {LARGEST_INPUT}",
        lambda size: STRIDE <= size <= LARGEST_INPUT and size % STRIDE == 0,
    ),
    **dict.fromkeys(
        (
            *("batch_size", "epochs", "total_iters", "display_interval", "val_interval", "save_interval"),
            *("keep_last", "keep_best", "keep_every", "top", "iterations"),
        ),
        _COUNT,
    ),
    "micro_batch_size": Rule(
        "at least 2 and at most 10**12: batch normalisation needs two images", lambda number: 2 <= number <= 10**12
    ),
    "lr": Rule("above 0", lambda lr: 0 < lr < math.inf),
    "momentum": _SHARE,
    "weight_decay": Rule("at least 0", lambda decay: 0 <= decay < math.inf),
    "label_smooth": _SHARE,
    "ema_decay": Rule("above 0 and below 1", lambda decay: 0 < decay < 1),
    "seed": Rule("at least 0 and below 2**63", lambda seed: 0 <= seed < 2**63),
    "workers": _between(0, MAX_WORKERS),
    "limit": _between(1, MOST_ROWS),
    "grace": Rule("at least 0 and at most 10**6", lambda seconds: 0 <= seconds <= 10**6),
    "device": _match(r"auto|cpu|mps|cuda(:\d{1,3})?", "auto, cpu, mps, cuda or cuda:N"),
    "job": _match(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, dots, hyphens and underscores, at most 100"),
    "mean_image": Rule(
        "a .npy file, or .xml in OpenCV's format",
        lambda path: Path(path).suffix.lower() in MEAN_IMAGE_SUFFIXES,
        "mean-image-suffix",
    ),
    "amp": _one_of(AMP_DTYPES),
    "augment": _one_of(AUGMENT_NAMES),
    "on_bad_image": _one_of(ON_BAD_IMAGE),
    "on_save_error": _one_of(ON_SAVE_ERROR),
    "log_to": _one_of(LOG_TO),
    "format": _one_of(EXPORT_FORMATS),
    "name": _match(
        r"[^/:@'\s][^/:@']{0,99}", "a name without / : @ and quotes, of at most 100 letters", "model-name-invalid"
    ),
    "alias": _match(
        r"(?i:(?!v\d+$|latest$)[A-Za-z0-9_-]{1,100})",
        "letters, digits, _ and -, and neither latest nor a version such as v1",
        "alias-invalid",
    ),
}
"""Option -> the rule for its value. A test runs every command with values that break them."""


class Exclusion(NamedTuple):
    """Two options of which one may be given."""

    first: str
    second: str
    code: str


EXCLUSIONS = (
    Exclusion("epochs", "total_iters", "epochs-and-total-iters"),
    Exclusion("init_from", "pretrained", "init-from-and-pretrained"),
)


def check_rule(name: str, value: Any, *, field: str | None = None) -> None:
    """Raise ConfigError if `value` breaks the rule for the option `name`.

    Args:
        field: the option to name in the message, where another one takes such a value.
    """
    rule = RULES[name]
    _require(rule.holds(value), field or name, value, rule.text, rule.code)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option's value breaks its rule, or two options exclude each other.

    Args:
        options: any of them; None means not given, names without a rule are ignored.
    """
    for name, value in options.items():
        if name in RULES and value is not None:
            check_rule(name, value)
    for pair in EXCLUSIONS:
        given = [(name, options.get(name)) for name in (pair.first, pair.second)]
        if all(value is not None and value is not False for _, value in given):
            shown = [option(name) + ("" if value is True else f" (={value})") for name, value in given]
            raise ConfigError(f"{' and '.join(shown)} exclude each other; give one of them", code=pair.code)


def check_batch_to_train(batch_size: int) -> None:
    """Raise ConfigError for a batch that batch normalisation cannot train on."""
    _require(batch_size >= 2, "batch_size", batch_size, "at least 2: batch normalisation needs two images")


def check_types(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if the value of a field of `TrainConfig` is of another type; other names are ignored."""
    for name in FIELDS:
        if name in values:
            value, expected = values[name], _TYPES[name]
            fits = isinstance(value, expected) and (expected == (bool,) or not isinstance(value, bool))
            _require(fits, name, repr(value), f"of type {' or '.join(kind.__name__ for kind in expected)}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run with every option decided, as stored in its checkpoints and as `config.json`.

    Keys are the command line's options, with underscores.

    Raises:
        ConfigError: a value cannot work; the message names the option.
    """

    model: str
    """Name of the network."""
    choices: str | None
    """Branch of each of the network's units, comma-separated; None: the published ones."""
    scales: str | None
    """Width of each of the network's units, comma-separated; None: the published ones."""
    init_from: str | None
    """Absolute reference of the checkpoint with the initial weights; None: random ones."""
    pretrained: bool
    """Start from the weights that torchvision publishes."""
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
    """Length of the whole run, iterations."""
    lr: float
    """Learning rate at the first iteration; it falls linearly to 0."""
    momentum: float
    """Momentum of SGD."""
    weight_decay: float
    """Weight decay of parameters with two or more dimensions."""
    label_smooth: float
    """Share of the target that is spread over all classes."""
    seed: int
    """Random seed: initial weights, data order, augmentation, dropout."""
    mean_image: str | None
    """Absolute path of the mean image that is subtracted from the input; None: a mean per channel, if any. Each
    checkpoint holds the image itself."""
    augment: str
    """Name of the training augmentation."""
    on_bad_image: str
    """On an unreadable image: `fail` or `skip`."""
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
    """Keep this many of the newest checkpoints; see `checkpoints.retention.Retention`. Without a rule, all are kept."""
    keep_best: int | None = None
    """Keep this many of the checkpoints with the highest validation accuracy."""
    keep_every: int | None = None
    """Keep the checkpoints whose iteration is a multiple of this."""
    on_save_error: str = "fail"
    """On a checkpoint that cannot be written: `fail` or `continue`."""
    ema_decay: float | None = None
    """Decay per iteration of a moving average of the weights; None: no average. If there is one, it is what validation
    and evaluation measure."""
    micro_batch_size: int | None = None
    """Most images per forward pass, over which batch normalisation averages; None: the whole batch."""
    sync_bn: bool = False
    """Batch normalisation averages over the images of all processes; needs CUDA."""
    amp: str = "off"
    """Mixed precision in training: `off`, `bf16`, or `fp16` with a loss scaler. Evaluation is in full precision."""
    compile: bool = False
    """Train the network with `torch.compile`: other rounding, minutes of compilation, then possibly faster steps."""

    def __post_init__(self) -> None:
        values = self.to_dict()
        check_types(values)
        check_batch_to_train(self.batch_size)
        check_options(values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field."""
        return asdict(self)


FIELDS = tuple(field.name for field in fields(TrainConfig))

_TYPES: dict[str, tuple[type, ...]] = {
    name: (float, int, *get_args(hint)[1:]) if hint is float or float in get_args(hint) else get_args(hint) or (hint,)
    for name, hint in get_type_hints(TrainConfig).items()
}
"""Field -> types of its values. A whole number may stand for a fraction."""
