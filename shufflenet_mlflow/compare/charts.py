"""The page's charts, drawn by Bokeh in the reader's browser: curves of the runs, and their exported files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady
from bokeh.models import ColumnDataSource, CustomJS, DataRange1d, HoverTool, NumeralTickFormatter, Span
from bokeh.plotting import figure
from bokeh.resources import Resources
from markupsafe import Markup

from shufflenet_mlflow.compare.comparison import Comparison, Curve
from shufflenet_mlflow.compare.results import INFINITE
from shufflenet_mlflow.tracking.names import DEPLOY_SECTION

AXES = {"iteration": "iteration", "epoch": "epoch", "time": "minutes, pauses included"}
"""Column of a curve's data -> label of the x axis."""

_PANELS = {"accuracy": ("val/top1", "train/top1"), "loss": ("val/loss", "train/loss")}
"""Quantity -> its curves; the validation's first."""

_MARKED_UP_TO = 40
"""Points of a curve that are marked one by one."""

MARKERS = {"circle": "●", "square": "■", "diamond": "◆", "triangle": "▲", "inverted_triangle": "▼", "star": "★"}
"""Bokeh's name of a marker -> the letter that looks like it; each kind of exported file has one."""
_USUAL, _FAR = 0.9, 4.0
"""Values above the first quantile, and so many times as high, are cut off."""

_HEIGHT = 300


@dataclass(frozen=True)
class Deployed:
    """An exported file of a run, as far as its metrics know it."""

    run: int
    kind: str
    """Such as `onnx-int8`."""
    top1: float
    megabytes: float | None
    milliseconds: float | None
    """Median latency of one image with one thread."""


def kinds_of(deployed: Sequence[Deployed]) -> list[str]:
    """Return the kinds of files, in the order of their markers."""
    return sorted({entry.kind for entry in deployed})


@dataclass(frozen=True)
class Charts:
    """Scripts and places of the charts."""

    library: Markup
    """Bokeh itself, so that the page needs no network."""
    script: Markup
    curves: tuple[Markup, ...]
    axes: tuple[str, ...]
    """Quantities that the curves can be drawn over."""
    deployed: tuple[Markup, ...]
    is_cut: bool
    """Some values are above the charts."""


def deployed_of(comparison: Comparison) -> list[Deployed]:
    """Return the exported files whose accuracy the runs know."""
    found = []
    for index, run in enumerate(comparison.runs):
        for name, top1 in run.metrics.items():
            kind = name.removeprefix(DEPLOY_SECTION).removesuffix("/top1")
            if name != f"{DEPLOY_SECTION}{kind}/top1":
                continue
            size = run.metrics.get(f"{DEPLOY_SECTION}{kind}/bytes")
            latency = run.metrics.get(f"{DEPLOY_SECTION}{kind}/latency_ms_batch_1_1_thread")
            found.append(Deployed(index, kind, top1, None if size is None else size / 1e6, latency))
    return found


def draw(comparison: Comparison) -> Charts | None:
    """Return the charts of a comparison; None if there is nothing to draw."""
    panels = [(name, metrics) for name, metrics in _PANELS.items() if _curves_of(comparison, metrics)]
    files = _file_figures(comparison, deployed_of(comparison))
    if not panels and not files:
        return None
    document = Document()
    shared = DataRange1d(range_padding=0.02)
    drawn = _Curves([], [], [], [], [])
    for name, metrics in panels:
        drawn.add(name, _curves_of(comparison, metrics), shared)
    for plot in (*drawn.figures, *files):
        document.add_root(plot)
    document.js_on_event(DocumentReady, CustomJS(args={**vars(drawn), "files": files}, code=_script("charts.js")))
    script, places = components([*drawn.figures, *files], wrap_script=False)
    divs = [Markup(place) for place in places]  # noqa: S704 - made by Bokeh, of its own identifiers
    axes = [axis for axis in AXES if axis != "epoch" or any(curve.epochs for curve in comparison.curves)]
    return Charts(
        Markup("\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)),  # noqa: S704 - Bokeh's own code
        Markup(script),  # noqa: S704 - the same; it holds no text from the runs
        tuple(divs[: len(drawn.figures)]),
        tuple(axes),
        tuple(divs[len(drawn.figures) :]),
        any(highest_shown(_curves_of(comparison, metrics)) is not None for _, metrics in panels),
    )


def _script(name: str) -> str:
    return resources.files("shufflenet_mlflow.compare").joinpath(name).read_text("utf-8")


def _curves_of(comparison: Comparison, metrics: Sequence[str]) -> list[Curve]:
    return [curve for curve in comparison.curves if curve.metric in metrics]


def _new_figure(quantity: str, **attributes: Any) -> Any:
    """Return an empty figure without colours of its own: the page gives it those of its light or dark theme."""
    plot = figure(
        height=_HEIGHT,
        sizing_mode="stretch_width",
        tools="xbox_zoom,reset,save",
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        y_axis_label=quantity,
        **attributes,
    )
    if quantity == "accuracy":
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[0] %")
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    return plot


@dataclass(frozen=True)
class _Curves:
    """The figures of curves, and what their script is given: lists of equal length, one entry for each curve."""

    figures: list[Any]
    cursors: list[Span]
    """One in each figure: a line where the pointer is."""
    sources: list[ColumnDataSource]
    renderers: list[list[Any]]
    keys: list[str]
    """Metric and number of the run, such as `val/top1 0`, as the page's table names its cells."""

    def add(self, name: str, curves: Sequence[Curve], x_range: DataRange1d) -> None:
        """Add a figure with curves of one quantity."""
        y_range = DataRange1d(only_visible=True)
        if (highest := highest_shown(curves)) is not None:
            y_range.end = highest
        plot = _new_figure(name, x_range=x_range, y_range=y_range, x_axis_label=AXES["iteration"])
        cursor = Span(dimension="height", location=0, visible=False, line_dash="dotted")
        plot.add_layout(cursor)
        for curve in sorted(curves, key=lambda curve: curve.metric, reverse=True):  # validation above training
            is_validation = curve.metric.startswith("val/")
            source = ColumnDataSource(columns_of(curve))
            line = plot.line(
                *("x", "y"),
                source=source,
                line_width=2.2 if is_validation else 1.2,
                line_alpha=1.0 if is_validation else 0.45,
            )
            marks = [plot.scatter("x", "y", source=source, size=6)] if is_validation and _is_short(curve) else []
            self.sources.append(source)
            self.renderers.append([line, *marks])
            self.keys.append(f"{curve.metric} {curve.run}")
        self.figures.append(plot)
        self.cursors.append(cursor)


def _is_short(curve: Curve) -> bool:
    return len(curve.values) <= _MARKED_UP_TO


def highest_shown(curves: Sequence[Curve]) -> float | None:
    """Return where the y axis ends if a few values, such as the first losses, would leave no room for the others."""
    values = sorted(value for curve in curves for value in curve.values if abs(value) < INFINITE)
    if not values:
        return None
    usual = values[int(_USUAL * (len(values) - 1))]
    return 1.5 * usual if values[-1] > _FAR * usual > 0 else None


def columns_of(curve: Curve) -> dict[str, list[float]]:
    """Return the points over each of `AXES`; `x` is the one that is shown."""
    nowhere = [math.nan] * len(curve.values)
    return {
        "x": list(curve.iterations),
        "y": [value if abs(value) < INFINITE else math.nan for value in curve.values],
        "iteration": list(curve.iterations),
        "epoch": nowhere if curve.epochs is None else list(curve.epochs),
        "time": list(curve.minutes),
    }


def _file_figures(comparison: Comparison, deployed: Sequence[Deployed]) -> list[Any]:
    """Return accuracy over latency and over size of the exported files, as far as they were measured."""
    markers = dict(zip(kinds_of(deployed), cycle(MARKERS)))
    figures = []
    for label, name in (("ms for one image, one thread", "milliseconds"), ("MB", "megabytes")):
        entries = [entry for entry in deployed if getattr(entry, name) is not None]
        if not entries:
            continue
        plot = _new_figure("accuracy", x_axis_label=label, x_range=DataRange1d(start=0))
        plot.add_tools(HoverTool(tooltips=[("file", "@kind"), ("accuracy", "@y{0.0 %}"), (label, "@x{0.00}")]))
        for entry in entries:
            data = {"x": [getattr(entry, name)], "y": [entry.top1], "kind": [entry.kind]}
            plot.scatter(
                "x", "y", source=ColumnDataSource(data), size=11, marker=markers[entry.kind], name=str(entry.run)
            )
        figures.append(plot)
    return figures
