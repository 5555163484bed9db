"""An option that can also be set in a file and in the environment, and where its value is from."""

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Any

import click
from click.core import ParameterSource

DEBUG = "shufflenet_mlflow.debug"
VERBOSITY = "shufflenet_mlflow.verbosity"
CONFIG = "shufflenet_mlflow.config"
"""Keys of a context's `meta`: whether to show tracebacks; `verbose` or `quiet`; the file of options."""
ERROR_PRINTED = "shufflenet_mlflow.error_printed"
"""Key of a context's `meta`: the command's JSON document already holds the error that it ends with."""
NEXT_STEP = "shufflenet_mlflow.next_step"
"""Key of a context's `meta`: a command to print below the error."""

PREFIX = "SHUFFLENET_"
"""Prefix of the environment variables that set options."""


_EMPTY = ("", "''")

_LEAST_ALIKE, _LEAST_ALIKE_ALONE = 0.6, 0.8
"""Similarity of a part of a name, and of a name in one part."""


class Option(click.Option):
    """An option that can also be set in the environment, as `SHUFFLENET_BATCH_SIZE`, and in a file, as `batch_size`.

    Empty text means not given: `mlflow run` passes every parameter of an entry point, those that were not set as empty
    text; on Kubernetes as a pair of quotes, since no shell removes them there.

    Args:
        section: title under which the help shows it.
        in_files: whether a file may hold it.
        is_list: whether a file may hold a list instead of text with commas.
    """

    def __init__(
        self,
        *arguments: Any,
        section: str | None = None,
        in_files: bool = True,
        is_list: bool = False,
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section
        self.in_files = in_files
        self.is_list = is_list
        self.envvar = PREFIX + spelling(self).upper().replace("-", "_")

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        given = opts.get(str(self.name))
        if given in _EMPTY or (self.multiple and given and all(value in _EMPTY for value in given)):
            opts = {name: value for name, value in opts.items() if name != self.name}
        return super().consume_value(ctx, opts)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return None if value in _EMPTY else super().type_cast_value(ctx, value)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        source = source_of(ctx, self) if ctx is not None else None
        hint = super().get_error_hint(ctx)
        return hint if source is None else f"{hint} (from {source})"


ELSEWHERE = {
    **dict.fromkeys(("learning-rate", "lr0", "base-lr", "max-lr"), "lr"),
    **dict.fromkeys(("imgsz", "img-size", "image-size", "img"), "input-size"),
    **dict.fromkeys(("data", "data-dir", "data-path", "train-path"), "train-dir"),
    **dict.fromkeys(("test-dir", "val-path", "validation-dir"), "val-dir"),
    **dict.fromkeys(("output", "output-dir", "save", "save-path"), "save-dir"),
    **dict.fromkeys(("name", "exp-name"), "run-name"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("sched", "scheduler", "lr-scheduler"), "schedule"),
    **dict.fromkeys(("gpu", "gpus", "accelerator"), "device"),
    **dict.fromkeys(("num-workers", "loader-threads"), "workers"),
    **dict.fromkeys(("smoothing", "label-smoothing"), "label-smooth"),
    **dict.fromkeys(("log-interval", "print-freq"), "display-interval"),
    **dict.fromkeys(("arch", "network", "model-name"), "model"),
    **dict.fromkeys(("initial-checkpoint", "finetune-from", "weights"), "init-from"),
    **dict.fromkeys(("wd", "decay"), "weight-decay"),
    **dict.fromkeys(("classes", "nb-classes"), "num-classes"),
    **dict.fromkeys(("aa", "auto-augment"), "augment"),
    **dict.fromkeys(("clip-grad", "gradient-clip-val"), "clip-norm"),
    **dict.fromkeys(("freeze-backbone",), "freeze"),
    **dict.fromkeys(("project",), "experiment"),
    **dict.fromkeys(("max-epochs", "num-epochs"), "epochs"),
    **dict.fromkeys(("max-steps", "max-iters", "iterations"), "total-iters"),
    **dict.fromkeys(("precision",), "amp"),
}
"""Names that options have in other programs -> what they are called here."""


def similar(word: str, known: Iterable[str], *, prefix: str = "") -> list[str]:
    """Return the names that a mistyped one may stand for, the most similar first.

    Every part of the name has to be similar: `log-interval` is not `val-interval`.

    Args:
        prefix: begins all names, and says nothing about them.
    """
    by_name = {name.removeprefix(prefix): name for name in known}
    word = word.removeprefix(prefix)
    related = [
        name for name in by_name if min(len(word), len(name)) >= 4 and (name.startswith(word) or word.startswith(name))
    ]
    near = [name for name in get_close_matches(word, by_name, n=4, cutoff=0.7) if _are_alike(word, name)]
    translated = [ELSEWHERE[word]] if ELSEWHERE.get(word) in by_name else []
    return [by_name[name] for name in dict.fromkeys([*translated, *related, *near[:2]])]


def _are_alike(word: str, name: str) -> bool:
    """Whether each part of a name resembles its counterpart, or the whole names do apart from their hyphens."""
    parts, others = re.split("[-_]", word.lower()), re.split("[-_]", name.lower())
    if len(parts) != len(others):
        parts, others = ["".join(parts)], ["".join(others)]
    least = _LEAST_ALIKE if len(parts) > 1 else _LEAST_ALIKE_ALONE
    return all(_is_slip(part, other, least) for part, other in zip(parts, others, strict=True))


def _is_slip(part: str, other: str, least: float) -> bool:
    """Whether two words share most letters, all of them in another order, or their beginnings."""
    ratio = SequenceMatcher(None, part, other).ratio()
    return (
        ratio >= least or sorted(part) == sorted(other) or (min(len(part), len(other)) >= 3 and part[:3] == other[:3])
    )


def spelling(parameter: click.Parameter) -> str:
    """Return the long name of an option, without the leading hyphens."""
    return max(parameter.opts, key=len).lstrip("-")


def source_of(ctx: click.Context, parameter: click.Parameter) -> str | None:
    """Return the variable or the file that a value is from; None if it was typed, or not given."""
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if source is ParameterSource.DEFAULT_MAP:
        return str(ctx.meta[CONFIG])
    return None
