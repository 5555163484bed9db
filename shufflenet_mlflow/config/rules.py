"""The rules that an option's value must keep, and the values that options have where several commands need them."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import platformdirs

from shufflenet_mlflow.errors import ConfigError

DEFAULT_MODEL = "shufflenet_v2_x0_5"
DEFAULT_EXPERIMENT = "shufflenet"
DEFAULT_SAVE_ROOT = "models"
DEFAULT_BATCH_SIZE = 64
DEFAULT_VAL_FRACTION = 0.2

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
RECIPE_NAMES = ("paper", "finetune", "modern", "qat")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("linear", "cosine", "constant")
AUGMENT_NAMES = ("release", "lighting", "shift", "trivial", "rand", "none")
BALANCES = ("none", "weights", "sampler")
ON_BAD_IMAGE = ("fail", "skip")
ON_SAVE_ERROR = ("fail", "continue")
LOG_TO = ("source", "new", "none")
REESTIMATION_IMAGES = 1_280_000
"""By default, the most training images that BN statistics are re-estimated from; never more than one epoch."""
EXPORT_FORMATS = ("pt2", "onnx", "openvino", "mlflow")
SPLITS = ("train", "val", "test")
MEAN_IMAGE_SUFFIXES = (".npy", ".xml")


def default_cache_dir() -> Path:
    """Return the folder of fetched checkpoints and of the demo set: `SHUFFLENET_CACHE_DIR`, or the user's cache."""
    chosen = os.environ.get("SHUFFLENET_CACHE_DIR")
    return Path(chosen) if chosen else platformdirs.user_cache_path("shufflenet-mlflow")


def option(name: str) -> str:
    """Return a field's name as the command line spells it."""
    return "--" + name.replace("_", "-")


def require_that(condition: bool, field: str, value: object, rule: str, code: str | None = None) -> None:
    """Raise ConfigError "--field (=value) must be rule" unless the condition holds."""
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
    require_that(bool(numbers), field, text, "numbers with commas between them")
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


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


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
    "ema_decay": Rule("above 0 and below 1, or 0 for no average", lambda decay: 0 <= decay < 1),
    "recipe": _one_of(RECIPE_NAMES),
    "optimizer": _one_of(OPTIMIZERS),
    "schedule": _one_of(SCHEDULES),
    "warmup_epochs": Rule("at least 0 and at most 10**6", lambda epochs: 0 <= epochs <= 10**6),
    "clip_norm": Rule("above 0, or 0 for no clipping", lambda norm: 0 <= norm < math.inf),
    "erasing": Rule("from 0 to 1", lambda probability: 0 <= probability <= 1),
    **dict.fromkeys(("mixup", "cutmix"), Rule("from 0 to 100", lambda alpha: 0 <= alpha <= 100)),
    "balance": _one_of(BALANCES),
    "freeze": _match(r"none|backbone|[0-4]", "none, backbone, or a number of stages from 0 to 4"),
    "head_lr_factor": Rule("above 0 and at most 10**6", lambda factor: 0 < factor <= 10**6),
    "layer_decay": Rule("above 0 and at most 1", lambda factor: 0 < factor <= 1),
    "patience": Rule("from 0 to 10**12", lambda number: 0 <= number <= 10**12),
    "seed": Rule("at least 0 and below 2**63", lambda seed: 0 <= seed < 2**63),
    "bn_images": _between(1, 10**12),
    "workers": _between(0, MAX_WORKERS),
    "threads": _between(1, MAX_WORKERS),
    "limit": _between(1, MOST_ROWS),
    "calibration_images": _between(1, 100_000),
    "grace": Rule("at least 0 and at most 10**6", lambda seconds: 0 <= seconds <= 10**6),
    "device": _match(r"auto|cpu|mps|cuda(:\d{1,3})?", "auto, cpu, mps, cuda or cuda:N"),
    "job": _match(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, dots, hyphens and underscores, at most 100"),
    "repeat": _between(2, 1000),
    "study": _match(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}",
        "letters, digits, dots, hyphens and underscores, at most 80",
        "study-name",
    ),
    "trials": _between(1, 10_000),
    "rungs": _between(1, 10),
    "reduction": _between(2, 100),
    "generation": _between(1, 10_000),
    **dict.fromkeys(("asynchronous", "pareto"), Rule("true or false", lambda value: isinstance(value, bool))),
    "max_parallel": _between(1, 64),
    "sampler": _one_of(("tpe", "random", "grid", "cmaes")),
    "direction": _one_of(("maximize", "minimize")),
    "macs_limit": Rule("at least 1 and at most 10**15", lambda macs: 1 <= macs <= 10**15),
    "latency_limit": Rule("above 0 and at most 10**6 ms", lambda ms: 0 < ms <= 10**6),
    "population": _between(1, 10_000),
    "generations": _between(0, 10_000),
    **dict.fromkeys(("mutations", "crossovers"), _between(0, 10_000)),
    "mutation_probability": Rule("above 0 and at most 1", lambda probability: 0 < probability <= 1),
    "score_images": _between(1, 10**12),
    "trust": _between(4, 1000),
    "trust_epochs": _between(1, 10_000),
    "metric": _one_of(("val/top1", "val/top5", "val/mean_class_accuracy", "val/loss")),
    "storage": _match(r"[A-Za-z][A-Za-z0-9+]*://.+", "an address such as postgresql://host/db or sqlite:///studies.db"),
    "time_budget": Rule("above 0 and at most 10**9 seconds", lambda seconds: 0 < seconds <= 10**9),
    "mean_image": Rule(
        "a .npy file, or .xml in OpenCV's format",
        lambda path: Path(path).suffix.lower() in MEAN_IMAGE_SUFFIXES,
        "mean-image-suffix",
    ),
    "val_fraction": Rule("above 0 and below 1", lambda fraction: 0 < fraction < 1),
    "group_by": Rule("a regular expression", _is_pattern),
    "split": _one_of(SPLITS),
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
    Exclusion("qat", "init_from", "qat-and-init-from"),
    Exclusion("qat", "pretrained", "qat-and-pretrained"),
    Exclusion("qat", "sync_bn", "qat-and-sync-bn"),
    Exclusion("search", "model", "search-and-model"),
    Exclusion("search", "choices", "search-and-choices"),
    Exclusion("search", "scales", "search-and-scales"),
    Exclusion("asynchronous", "generation", "asynchronous-and-generation"),
    Exclusion("macs_limit", "latency_limit", "macs-limit-and-latency-limit"),
    Exclusion("pareto", "top", "pareto-and-top"),
    Exclusion("val_dir", "val_fraction", "val-dir-and-val-fraction"),
    Exclusion("val_dir", "group_by", "val-dir-and-group-by"),
)


def check_rule(name: str, value: Any, *, field: str | None = None) -> None:
    """Raise ConfigError if `value` breaks the rule for the option `name`.

    Args:
        field: the option to name in the message, where another one takes such a value.
    """
    rule = RULES[name]
    require_that(rule.holds(value), field or name, value, rule.text, rule.code)


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
    amp = options.get("amp")
    if options.get("qat") is not None and amp not in (None, "off"):
        raise ConfigError(
            f"--amp (={amp}) computes with fewer bits than --qat, which rounds as int8 does; leave one of them out",
            code="qat-and-amp",
        )


def check_batch_to_train(batch_size: int) -> None:
    """Raise ConfigError for a batch that batch normalisation cannot train on."""
    require_that(batch_size >= 2, "batch_size", batch_size, "at least 2: batch normalisation needs two images")
