"""Results as a reader sees them: which ones matter, what they are called, and in how many digits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shufflenet_mlflow.compare.comparison import Comparison, ResultRow
from shufflenet_mlflow.tracking.names import EVALUATION_SECTION

INFINITE = 1.7e308
"""MLflow stores infinity as the largest number."""

UNBROKEN = "\u00a0"
"""A space at which no line ends: between a number and its unit."""

NONE = "–"  # noqa: RUF001 - a dash
"""Stands for a value that a run does not have."""

_ACCURACIES = ("top1", "val_top1", "top5", "mean_class_accuracy", "majority")
_COSTS = {"macs": "Multiply-accumulates", "parameters": "Parameters"}
_KINDS = ("evaluation", "validation", "loss", "cost")
"""Kinds of rows, in their order."""
_SHARE_OF_NOTICE = 0.002
"""A mean of the classes' accuracies that is as near to the accuracy says nothing more."""


@dataclass(frozen=True)
class ShownRow:
    """A row of the table of results."""

    label: str
    values: tuple[str, ...]
    best: tuple[int, ...] = ()


def main_rows(comparison: Comparison) -> list[ShownRow]:
    """Return accuracies, losses and costs, in plain words."""
    labelled = [(label, row) for row in comparison.shown_results if (label := _label(row, comparison)) is not None]
    labelled.sort(key=lambda pair: _KINDS.index(_kind(pair[1].metric)))
    rows = [ShownRow(label, shown(row.metric, row.values), row.best) for label, row in labelled]
    minutes = [None if run.ended is None else (run.ended - run.started) / 60_000 for run in comparison.runs]
    if any(value is not None for value in minutes):
        rows.append(ShownRow("Time, pauses included", tuple(map(_duration, minutes))))
    return rows


def _kind(metric: str) -> str:
    """Return one of `_KINDS`; the images of an evaluation, unlike those of validation, chose no checkpoint."""
    if metric in _COSTS:
        return "cost"
    if metric.endswith("/loss"):
        return "loss"
    return "evaluation" if metric.startswith(EVALUATION_SECTION) else "validation"


def all_rows(comparison: Comparison) -> list[ShownRow]:
    """Return every result under its metric's name."""
    return [
        ShownRow(row.metric, tuple(NONE if value is None else f"{value:.6g}" for value in row.values), row.best)
        for row in comparison.shown_results
    ]


def _label(row: ResultRow, comparison: Comparison) -> str | None:
    """Return what a reader calls a metric; None for one that does not matter at first sight."""
    known = {other.metric: other.values for other in comparison.results}
    section, _, name = row.metric.rpartition("/")
    if row.metric in _COSTS:
        return _COSTS[name]
    if section == "best" and name == "val_top1":
        return "Validation accuracy, best"
    is_own = section == "val"
    if not (is_own or section.startswith(EVALUATION_SECTION)):
        return None
    on = "validation" if is_own else section.removeprefix(EVALUATION_SECTION)
    differing = "" if row.is_comparable else ", different images"
    if name == "top1" and not (is_own and "best/val_top1" in known):
        return f"Accuracy on {on}{differing}"
    if name == "mean_class_accuracy" and _differs(row.values, known.get(f"{section}/top1", ())):
        return f"Mean of the classes' accuracies on {on}{differing}"
    return f"Loss on {on}{differing}" if name == "loss" else None


def _differs(values: Sequence[float | None], others: Sequence[float | None]) -> bool:
    pairs = [(one, other) for one, other in zip(values, others, strict=False) if one is not None and other is not None]
    return any(abs(one - other) > _SHARE_OF_NOTICE for one, other in pairs)


def shown(metric: str, values: Sequence[float | None]) -> tuple[str, ...]:
    """Return the values of one metric in as few digits as tell them apart."""
    name = metric.rpartition("/")[2]
    if name in _ACCURACIES:
        return _apart(values, lambda value, digits: f"{100 * value:.{digits}f}{UNBROKEN}%", (1, 2))
    if name == "loss":
        return _apart(values, lambda value, digits: f"{value:.{digits}f}", (3, 4))
    if name in _COSTS:
        return _apart(values, _large, (1, 2))
    return tuple(_plain(value) or f"{value:.4g}" for value in values)


def _apart(
    values: Sequence[float | None], form: Callable[[float, int], str], digits: tuple[int, int]
) -> tuple[str, ...]:
    """Return the values in the first number of digits, or in the second if different ones would look the same."""
    fewer, more = (
        tuple(_plain(value) or form(value, count) if value is not None else NONE for value in values)
        for count in digits
    )
    return fewer if len(set(fewer)) == len(set(more)) else more


def _plain(value: float | None) -> str | None:
    """Return what stands for a value that is no usual number."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "not a number"
    return "infinite" if abs(value) > INFINITE else None


def _large(value: float, digits: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{digits}f}{UNBROKEN}{unit}"
    return f"{value:.0f}"


def _duration(minutes: float | None) -> str:
    if minutes is None:
        return NONE
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
