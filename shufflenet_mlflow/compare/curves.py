"""Plot the curves of several runs."""

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from shufflenet_mlflow.compare.comparison import CURVES, Comparison, Curve
from shufflenet_mlflow.evaluation.plots import new_figure

AXES: dict[str, tuple[str, Callable[[Curve], Sequence[float] | None]]] = {
    "iterations": ("iterations", lambda curve: curve.iterations),
    "images": ("images seen", lambda curve: curve.images),
    "time": ("minutes, pauses included", lambda curve: curve.minutes),
}
"""File name -> quantity on the x axis."""

_COLOURS = ("#2f6fb2", "#d1603d", "#3d8f5f", "#8a5fb0", "#b08a2e", "#4a4a4a", "#c05a8f", "#5aa6b8")
_MARKED_UP_TO = 40
_INFINITE = 1.7e308
"""MLflow stores infinity as the largest number, next to which nothing else can be drawn."""


def curves_figure(comparison: Comparison, over: str) -> Figure | None:
    """Return a figure of loss and accuracy of all runs over one of `AXES`; None if there is no curve."""
    label, along = AXES[over]
    shown = [metric for metric in CURVES if any(curve.metric == metric for curve in comparison.curves)]
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    figure = new_figure(11, 3.4 * rows + 0.8)
    grid = list(figure.subplots(rows, min(2, len(shown)), squeeze=False).flat)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    for axes, metric in zip(grid, shown, strict=False):
        for curve in comparison.curves:
            positions = along(curve)
            if curve.metric == metric and positions is not None:
                axes.plot(
                    positions,
                    [value if abs(value) < _INFINITE else math.nan for value in curve.values],
                    color=_COLOURS[curve.run % len(_COLOURS)],
                    marker="o" if len(positions) <= _MARKED_UP_TO else "",
                    markersize=3,
                    linewidth=1.3,
                )
        axes.set(xlabel=label, title=metric)
        axes.grid(color="#e6e9ed", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        grid[0].plot(
            [], [], color=_COLOURS[index % len(_COLOURS)], label=f"{run.name} ({run.short_id})".replace("$", r"\$")
        )[0]
        for index, run in enumerate(comparison.runs)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)), frameon=False)
    return figure
