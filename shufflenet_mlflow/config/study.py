"""A study of `tune`: the space that its trials are drawn from, and everything else that decides them.

No torch, MLflow, Optuna or click is imported here, so that the command line can report wrong usage at once.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shufflenet_mlflow.config.rules import check_batch_to_train, check_options, check_rule, option
from shufflenet_mlflow.config.training import FIELDS, check_types, types_of
from shufflenet_mlflow.errors import ConfigError

SAMPLERS = ("tpe", "random", "grid", "cmaes")
DIRECTIONS = ("maximize", "minimize")
METRICS = ("val/top1", "val/top5", "val/mean_class_accuracy", "val/loss")
DEFAULT_TRIALS = 16
DEFAULT_RUNGS = 3
DEFAULT_REDUCTION = 3
DEFAULT_GENERATION = 8
MOST_TRIALS = 10_000
MOST_CHOICES = 1000

FIXED = {
    **dict.fromkeys(("epochs", "total_iters"), "all trials of a study have one length"),
    **dict.fromkeys(("patience",), "the rungs of a study say when a trial ends"),
    **dict.fromkeys(("seed",), "a study compares options on one seed"),
    **dict.fromkeys(
        ("train_dir", "val_dir", "val_fraction", "group_by", "num_classes", "on_bad_image"),
        "all trials of a study have the same images",
    ),
    **dict.fromkeys(("init_from", "qat", "teacher", "pretrained", "mean_image"), "it is no number or word of a list"),
    **dict.fromkeys(
        (
            *("device", "workers", "display_interval", "val_interval", "save_interval", "compile"),
            *("keep_last", "keep_best", "keep_every", "on_save_error", "sync_bn", "choices", "scales"),
        ),
        "it changes nothing that a study compares",
    ),
}
"""Option of training that `--param` does not take -> the reason."""

TUNABLE = tuple(name for name in FIELDS if name not in FIXED)


@dataclass(frozen=True)
class Param:
    """One option of the space, and the values that it is drawn from."""

    name: str
    kind: Literal["choices", "float", "log", "int"]
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0

    @classmethod
    def parse(cls, text: str) -> "Param":
        """Parse `KEY=a,b,c`, `KEY=low:high`, `KEY=log:low:high` or `KEY=int:low:high`.

        Raises:
            ConfigError: it has another form, there is no such option, or a value breaks the option's rule.
        """
        key, equals, spec = text.partition("=")
        name = key.strip().lstrip("-").replace("-", "_")
        if not equals or not name or not spec.strip():
            raise ConfigError(
                f"--param (={text}) must be KEY=a,b,c, KEY=low:high, KEY=log:low:high or KEY=int:low:high",
                code="param-form",
            )
        _check_key(name, key.strip())
        param = _range(name, spec, text) if ":" in spec else _choices(name, spec, text)
        param.check(text)
        return param

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Param":
        """Return the param of the output of `asdict`."""
        return cls(**{**values, "choices": tuple(values["choices"])})

    def check(self, text: str) -> None:
        """Raise ConfigError if one of the values breaks the option's rule."""
        values: Iterable[Any] = self.choices
        if self.kind == "int":
            low, high = int(self.low), int(self.high)
            values = range(low, high + 1) if high - low <= MOST_CHOICES else (low, low + 1, high - 1, high)
        elif self.kind != "choices":
            values = (self.low, self.high)
        for value in values:
            try:
                check_types({self.name: value})
                check_options({self.name: value})
                if self.name == "batch_size":
                    check_batch_to_train(value)
            except ConfigError as error:
                raise ConfigError(f"--param (={text}): {error}", code="param-value") from error

    @property
    def spec(self) -> str:
        """The text after `KEY=`."""
        if self.kind == "choices":
            return ",".join(map(_as_typed, self.choices))
        return f"{'' if self.kind == 'float' else f'{self.kind}:'}{self.low!r}:{self.high!r}"


def _as_typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_key(name: str, written: str) -> None:
    if name in FIXED:
        raise ConfigError(f"--param: {option(name)} cannot be varied: {FIXED[name]}", code="param-fixed")
    if name not in TUNABLE:
        near = difflib.get_close_matches(name, TUNABLE, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "keys are options of training, such as lr"
        raise ConfigError(f"--param: there is no option {written!r}; {hint}", code="param-unknown")


def _value(name: str, word: str, text: str) -> Any:
    """Return a word as the option's type."""
    kinds = types_of(name)
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (float,) if float in kinds else (int,):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
    if str in kinds:
        return word
    wanted = "true or false" if bool in kinds else "a whole number" if float not in kinds else "a number"
    raise ConfigError(f"--param (={text}): {word!r} must be {wanted}", code="param-word")


def _choices(name: str, spec: str, text: str) -> Param:
    words = [word.strip() for word in spec.split(",")]
    values = tuple(_value(name, word, text) for word in words)
    if "" in words or len(set(values)) < len(values) or len(values) > MOST_CHOICES:
        raise ConfigError(
            f"--param (={text}) must be different values with commas between them, at most {MOST_CHOICES}",
            code="param-choices",
        )
    return Param(name, "choices", values)


def _range(name: str, spec: str, text: str) -> Param:
    *scale, low, high = spec.split(":")
    kind: Any = scale[0].strip() if scale else "float"
    kinds = types_of(name)
    if len(scale) > 1 or (scale and kind not in ("log", "int")) or not {int, float} & {*kinds}:
        raise ConfigError(
            f"--param (={text}) must be low:high, log:low:high or int:low:high of an option that is a number",
            code="param-range",
        )
    if float not in kinds and kind != "int":
        raise ConfigError(
            f"--param (={text}): {option(name)} takes whole numbers; write int:low:high", code="param-whole"
        )
    try:
        ends = (int(low), int(high)) if kind == "int" else (float(low), float(high))
    except ValueError as error:
        raise ConfigError(f"--param (={text}): {low}:{high} must be two numbers", code="param-ends") from error
    if not all(map(math.isfinite, ends)) or ends[0] >= ends[1] or (kind == "log" and ends[0] <= 0):
        raise ConfigError(
            f"--param (={text}): the first number must be below the second, and of log: above 0", code="param-order"
        )
    return Param(name, kind, low=ends[0], high=ends[1])


@dataclass(frozen=True)
class StudyPlan:
    """Everything that decides the trials of a study; it never changes once the study has begun."""

    space: tuple[Param, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of training that all trials share."""
    trials: int = DEFAULT_TRIALS
    rungs: int = DEFAULT_RUNGS
    reduction: int = DEFAULT_REDUCTION
    """One of so many trials goes on from a rung to the next."""
    sampler: str = "tpe"
    generation: int = DEFAULT_GENERATION
    """Trials that are drawn together, from the values of the generations before."""
    metric: str = METRICS[0]
    direction: str = "maximize"
    max_parallel: int = 1
    repeats: bool = False
    """The trials differ in nothing but the seed, and all train to the end: `train --repeat`."""
    asynchronous: bool = False
    """Trials are promoted, and drawn one by one, as soon as a worker is free; no rung is waited for."""

    @property
    def seed(self) -> int:
        """Seed of the study and of all its trials."""
        return int(self.options.get("seed", 0))

    @property
    def effective_generation(self) -> int:
        """Trials that are drawn together: all of them where values play no part."""
        if self.repeats or self.sampler in ("random", "grid"):
            return self.trials
        return 1 if self.asynchronous else min(self.generation, self.trials)

    def is_better(self, value: float, other: float) -> bool:
        """Whether the first value is better than the second."""
        return value > other if self.direction == "maximize" else value < other

    def rank(self, value: float) -> float:
        """Return a number by which the better of two values comes first."""
        return -value if self.direction == "maximize" else value

    def to_json(self) -> str:
        """Return the plan as JSON, the same for equal plans."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "StudyPlan":
        """Return the plan of the output of `to_json`.

        Raises:
            ConfigError: it is none; a tag, say, that someone has edited.
        """
        try:
            values = json.loads(text)
            space = tuple(Param.from_dict(entry) for entry in values.pop("space"))
            plan = cls(space=space, **values)
            for param in space:
                if not (plan.repeats and param.name == "seed"):
                    _check_key(param.name, param.name)
                param.check(f"{param.name}={param.spec}")
            check_types(plan.options)
            check_options(plan.options)
            check_study({name: getattr(plan, name) for name in _RULED})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"the study's plan is not understood: {error}", code="study-plan-invalid") from error
        return plan


_RULED = (
    *("trials", "rungs", "reduction", "sampler", "generation", "metric", "direction", "max_parallel", "asynchronous"),
)


def check_study(options: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option of the study breaks its rule."""
    for name in _RULED:
        if options.get(name) is not None:
            check_rule(name, options[name])


def parse_space(texts: Iterable[str]) -> tuple[Param, ...]:
    """Parse the values of `--param`.

    Raises:
        ConfigError: see `Param.parse`; or an option is named twice.
    """
    space = tuple(map(Param.parse, texts))
    names = [param.name for param in space]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--param names {twice[0]} twice; give all its values in one", code="param-twice")
    return space


def check_sampler(sampler: str, space: Iterable[Param]) -> None:
    """Raise ConfigError if the sampler cannot draw from the space."""
    ranges = [param for param in space if param.kind in ("float", "log")]
    if sampler == "grid" and ranges:
        raise ConfigError(
            f"--sampler grid tries every value, and --param {ranges[0].name}={ranges[0].spec} has no end of them; "
            "list them as a,b,c",
            code="grid-of-range",
        )
    if sampler == "cmaes" and all(param.kind == "choices" for param in space):
        raise ConfigError("--sampler cmaes needs a range among --param, such as lr=log:0.003:0.3", code="cmaes-ranges")


def grid_size(space: Iterable[Param]) -> int:
    """Return the number of combinations of a space without ranges of fractions."""
    return math.prod(len(p.choices) if p.kind == "choices" else int(p.high) - int(p.low) + 1 for p in space)


def plan_of(values: Mapping[str, Any], training: Mapping[str, Any]) -> StudyPlan:
    """Return the plan that a command asks for.

    Args:
        values: options of the study by name, None or () if not given.
        training: options of training that were given.

    Raises:
        ConfigError: a value cannot work, or there is no `--param`.
    """
    check_study(values)
    space = parse_space(values.get("param") or ())
    check_space(space, training)
    sampler = values.get("sampler") or "tpe"
    check_sampler(sampler, space)
    if sampler == "cmaes" and values.get("asynchronous"):
        raise ConfigError(
            "--sampler cmaes draws whole generations, and --asynchronous one trial at a time; leave one of them out",
            code="cmaes-asynchronous",
        )
    trials = values.get("trials") or (min(grid_size(space), MOST_TRIALS) if sampler == "grid" else DEFAULT_TRIALS)
    metric = values.get("metric") or METRICS[0]
    direction = values.get("direction") or ("minimize" if metric == "val/loss" else "maximize")
    given = {
        name: values[name]
        for name in ("rungs", "reduction", "generation", "max_parallel")
        if values.get(name) is not None
    }
    return StudyPlan(
        space,
        dict(training),
        trials=min(trials, grid_size(space)) if sampler == "grid" else trials,
        sampler=sampler,
        metric=metric,
        direction=direction,
        asynchronous=bool(values.get("asynchronous")),
        **given,
    )


def plan_of_repeats(count: int, training: Mapping[str, Any], max_parallel: int = 1) -> StudyPlan:
    """Return the plan of several trainings that differ in nothing but the seed, from the given one on."""
    check_rule("repeat", count)
    first = int(training.get("seed") or 0)
    options = {name: value for name, value in training.items() if name != "seed"}
    space = (Param("seed", "int", low=first, high=first + count - 1),)
    return StudyPlan(space, {**options}, trials=count, rungs=1, sampler="grid", repeats=True, max_parallel=max_parallel)


def check_space(space: Iterable[Param], training: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option is both given and varied, or is one that a study decides."""
    if training.get("patience"):
        raise ConfigError(
            f"--patience (={training['patience']}) does not go with a study: {FIXED['patience']}; leave it out",
            code="study-patience",
        )
    for param in space:
        if training.get(param.name) is not None:
            raise ConfigError(
                f"{option(param.name)} (={training[param.name]}) is varied by --param, too; give one of them",
                code="param-and-option",
            )
