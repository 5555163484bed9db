"""Figures of a search, as SVG: accuracy over cost, progress by generation, which branch stands where."""

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from shufflenet_mlflow.evaluation.plots import new_figure, write_figure
from shufflenet_mlflow.models.search_space import STAGE_UNITS, UNITS, WIDTHS
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.workflows.searching.evolution import Scored
from shufflenet_mlflow.workflows.searching.latency import LatencyTable
from shufflenet_mlflow.workflows.searching.report import SearchReport, shares
from shufflenet_mlflow.workflows.searching.trust import Trust

BRANCH_NAMES = ("3x3", "5x5", "7x7", "Xception")
_BLUE, _RED = "#2f6fb2", "#b5482a"
_COLOURS = ("#c6dbef", "#6baed6", "#2171b5", "#f4a261")


def figures_of(report: SearchReport, shown: int) -> dict[str, str]:
    """Return file name -> figure.

    Args:
        shown: how many of the best candidates the figure of branches counts, where no front is searched.
    """
    drawings: dict[str, Callable[[], Figure]] = {
        "accuracy_over_macs.svg": lambda: _accuracy_over_cost(report),
        "generations.svg": lambda: _generations(report),
        "choices.svg": lambda: _choices(report, shown),
    }
    if report.best is not None and len(report.best.genes) > UNITS:
        drawings["widths.svg"] = lambda: _widths(report, shown)
    if (latency := report.latency) is not None:
        drawings["accuracy_over_latency.svg"] = lambda: _accuracy_over_cost(report, latency)
    if (trust := report.trust) is not None:
        drawings["trust.svg"] = lambda: _trust(trust, report.plan.seed)
    return {name: _svg(draw()) for name, draw in drawings.items()} if report.candidates else {}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "search"}):
        write_figure(figure, buffer, "svg")
    return buffer.getvalue()


def _accuracy_over_cost(report: SearchReport, latency: LatencyTable | None = None) -> Figure:
    def cost(scored: Scored) -> float:
        return scored.macs / 1e6 if latency is None else latency.ms(scored.genes)

    limit = report.plan.macs_limit
    limit_shown = (limit and limit / 1e6) if latency is None else report.plan.latency_limit
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    points = axes.scatter(
        [cost(scored) for scored in report.candidates],
        [scored.score for scored in report.candidates],
        c=[scored.generation for scored in report.candidates],
        cmap="viridis",
        s=14,
    )
    figure.colorbar(points, ax=axes, label="generation")
    best, front = report.best, report.front if latency is report.latency else []
    if front:
        costs, scores = [cost(scored) for scored in front], [scored.score for scored in front]
        axes.step(costs, scores, where="post", color=_RED, linewidth=1, marker="o", markersize=4, label="front")
        axes.legend(loc="lower right")
    elif best is not None:
        axes.scatter([cost(best)], [best.score], s=90, facecolors="none", edgecolors=_RED, label="best")
        axes.legend(loc="lower right")
    label = "multiply-accumulates, M" if latency is None else "latency by the table, ms"
    if limit_shown is not None:
        axes.axvline(limit_shown, color=_RED, linewidth=1, linestyle=":")
        label = f"{label} (the dotted line is the limit)"
    axes.set(xlabel=label, ylabel="accuracy on held-out images")
    axes.set_title(f"All {len(report.candidates)} candidates")
    return figure


def _generations(report: SearchReport) -> Figure:
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    axes.scatter(
        [scored.generation for scored in report.candidates],
        [scored.score for scored in report.candidates],
        color=_BLUE,
        s=10,
        alpha=0.5,
        label="candidates",
    )
    axes.plot(report.best_by_generation(), color=_RED, label="best so far")
    axes.legend(loc="lower right")
    axes.set(xlabel="generation", ylabel="accuracy on held-out images", title="Progress by generation")
    return figure


def _choices(report: SearchReport, shown: int) -> Figure:
    figure = _shares(report, [one.choices for one in report.chosen(shown)], BRANCH_NAMES, _COLOURS)
    figure.axes[0].set_title("Which branch stands where")
    return figure


def _widths(report: SearchReport, shown: int) -> Figure:
    colours = [to_hex(matplotlib.colormaps["viridis"](share)) for share in np.linspace(0, 1, len(WIDTHS))]
    networks = [one.genes[UNITS:] for one in report.chosen(shown)]
    figure = _shares(report, networks, [str(scale) for scale in WIDTHS], colours)
    figure.axes[0].set_title("Which width stands where, over half of the unit's output")
    return figure


def _shares(
    report: SearchReport, networks: Sequence[Sequence[int]], names: Sequence[str], colours: Sequence[str]
) -> Figure:
    """Draw which share of networks has each option in each unit."""
    figure = new_figure(8.5, 4.2)
    axes = figure.subplots()
    by_unit, bottoms = shares(networks, len(names)), [0.0] * UNITS
    for option, (name, colour) in enumerate(zip(names, colours, strict=True)):
        heights = [unit[option] for unit in by_unit]
        axes.bar(range(1, UNITS + 1), heights, bottom=bottoms, color=colour, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    ends = [sum(STAGE_UNITS[:stage]) + 0.5 for stage in range(1, len(STAGE_UNITS))]
    axes.vlines(ends, 0, 1, color="#1b1f24", linewidth=1)
    axes.set_xticks(range(1, UNITS + 1))
    whose = "front's" if report.front else "best"
    axes.set(xlabel="unit (lines part the stages)", ylabel=f"share of the {whose} {len(networks)}", ylim=(0, 1))
    axes.legend(ncols=min(len(names), 5), loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    return figure


def _trust(trust: Trust, seed: int) -> Figure:
    figure = new_figure(6.0, 5.2)
    axes = figure.subplots()
    points = axes.scatter(
        [one.inherited / one.images for one in trust.compared],
        [one.trained / one.images for one in trust.compared],
        c=[one.macs / 1e6 for one in trust.compared],
        cmap="viridis",
        s=24,
    )
    figure.colorbar(points, ax=axes, label="multiply-accumulates, M")
    axes.set(
        xlabel="accuracy with the supernet's weights",
        ylabel=f"accuracy after {counted(trust.epochs, 'epoch')} of training",
    )
    axes.set_title(trust.in_words(seed).partition(" (")[0], fontsize=10)
    return figure
