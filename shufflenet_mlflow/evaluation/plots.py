"""Figures of an evaluation: confusion matrix, classes, calibration, mistakes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shufflenet_mlflow.data.decode import open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.data.remarks import remarks
from shufflenet_mlflow.evaluation.baseline import beside_majority
from shufflenet_mlflow.evaluation.report import CALIBRATION_BINS, Report
from shufflenet_mlflow.runtime.text import visible

MOST_NUMBERS = 20
"""The most classes for which the confusion matrix shows its counts."""

MOST_NAMES = 60
"""The most classes that are named along an axis."""

GALLERY = 24
"""Number of mistakes to show."""

_COLUMNS = 6
_INK, _BLUE, _GREY = "#1b1f24", "#2f6fb2", "#c9d1d9"
_CAPTION = {"ha": "center", "va": "top", "fontsize": 6, "color": "#59636e"}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches, that belongs to no window."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def confusion_figure(report: Report) -> Figure:
    """Draw the confusion matrix, each row as fractions of its class."""
    counts_CC, classes = report.confusion_CC, report.classes
    size = min(14.0, max(4.5, 0.32 * len(classes) + 2.5))
    figure = new_figure(size + 0.8, size)
    axes = figure.subplots()
    fractions_CC = counts_CC / np.maximum(1, counts_CC.sum(1, keepdims=True))
    image = axes.imshow(fractions_CC, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="fraction of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title="\n".join(("Confusion matrix", *_in_short(report))))
    if len(classes) <= MOST_NAMES:
        axes.set_xticks(range(len(classes)), [_short(name) for name in classes], rotation=90)
        axes.set_yticks(range(len(classes)), [_short(name) for name in classes])
    if len(classes) <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts_CC):
            if count:
                color = "white" if fractions_CC[row, column] > 0.5 else _INK
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    return figure


def classes_figure(report: Report) -> Figure:
    """Draw the accuracy of the `MOST_NAMES` classes with the lowest, lowest first."""
    rows = [row for row in report.class_rows() if row.accuracy is not None]
    rows.sort(key=lambda row: row.accuracy or 0.0)
    shown = rows[:MOST_NAMES]
    figure = new_figure(6.5, max(2.5, 0.22 * len(shown) + 1.2))
    axes = figure.subplots()
    bars = axes.barh([_short(row.name) for row in shown], [row.accuracy or 0.0 for row in shown], color=_BLUE)
    right = [f"{round((row.accuracy or 0.0) * row.images)} of {row.images}" for row in shown]
    axes.bar_label(bars, right, padding=3, fontsize=7, color=_INK)
    axes.invert_yaxis()
    title = f"Accuracy by class ({len(shown)} of {len(rows)})\n{', '.join(_in_short(report))}"
    axes.set(xlim=(0, 1.16), xlabel="accuracy, and how many images of each class are right")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title(title, fontsize=10)
    axes.axvline(report.mean_class_accuracy, color=_INK, linewidth=1, linestyle=":")
    return figure


def _in_short(report: Report) -> tuple[str, str]:
    mean = f"mean class {report.mean_class_accuracy:.4f}"
    return f"accuracy {beside_majority(report.accuracy, report.majority)}", mean


def calibration_figure(report: Report) -> Figure:
    """Draw the accuracy by predicted probability, and the number of images in each bin."""
    bins = report.calibration_bins()
    figure = new_figure(5.0, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=_GREY, linestyle="--")
    upper.plot([entry.confidence for entry in bins], [entry.accuracy for entry in bins], "o-", color=_BLUE)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.set_title(f"Calibration (expected error {report.calibration_error():.3f})")
    lower.bar(
        [(entry.low + entry.high) / 2 for entry in bins],
        [entry.images for entry in bins],
        width=0.9 / CALIBRATION_BINS,
        color=_BLUE,
    )
    lower.set(xlabel="probability of the predicted class", ylabel="images")
    return figure


def mistakes_figure(report: Report, root: Path) -> Figure:
    """Draw the images below `root` that were misclassified with the highest probability."""
    mistakes = report.worst_mistakes(GALLERY)
    rows = max(1, -(-len(mistakes) // _COLUMNS))
    figure = new_figure(1.7 * _COLUMNS, 2.2 * rows + 0.4)
    figure.suptitle(f"Most confident mistakes ({len(mistakes)} of {int((~report.outcomes.is_correct).sum())})")
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, index in zip(grid, mistakes, strict=False):
        try:
            with remarks():
                small_HWC = open_picture(str(root / report.outcomes.paths[index]), Reading()).thumbnail(192)
        except UnreadableImageError:  # the file is gone
            continue
        axes.imshow(small_HWC)
        true = report.classes[report.outcomes.labels_N[index]]
        predicted = report.classes[report.outcomes.predicted_N[index]]
        title = f"{_short(true, 20)}\n→ {_short(predicted, 16)} {report.outcomes.probability_N[index]:.2f}"
        axes.set_title(title, fontsize=8)
        axes.text(0.5, -0.04, _end_of(report.outcomes.paths[index]), **_CAPTION, transform=axes.transAxes)
    return figure


def _end_of(path: str, most: int = 26) -> str:
    """Return a path, or its end, with which a file is found below the folder of images."""
    path = visible(path)
    return as_label(path if len(path) <= most else f"…{path[1 - most :]}")


def write_figure(figure: Figure, target: "Path | TextIO", form: str = "png") -> None:
    """Write a figure, without matplotlib's warnings about glyphs that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(target, format=form)


def figures_of(report: Report, root: Path) -> dict[str, Callable[[], Figure]]:
    """Return file name -> function that draws the figure."""
    confusion = {"confusion.png": lambda: confusion_figure(report)} if report.has_matrix else {}
    return {
        **confusion,
        "classes.png": lambda: classes_figure(report),
        "calibration.png": lambda: calibration_figure(report),
        "mistakes.png": lambda: mistakes_figure(report, root),
    }


def _short(name: str, most: int = 24) -> str:
    """Shorten a name for a figure to `most` characters."""
    name = visible(name)
    return as_label(name if len(name) <= most else f"{name[: most - 1]}…")


def as_label(text: str) -> str:
    """Return text that matplotlib draws as it is: `$` would start a formula."""
    return visible(text).replace("$", r"\$")
