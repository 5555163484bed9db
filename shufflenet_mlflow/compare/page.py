"""Write a comparison as files: an HTML page that needs nothing beside it, and JSON."""

from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any

from shufflenet_mlflow.compare.charts import AXES, MARKERS, deployed_of, draw, kinds_of
from shufflenet_mlflow.compare.comparison import Comparison
from shufflenet_mlflow.compare.paired import Change, PairedTest, mixed
from shufflenet_mlflow.compare.results import NONE, ShownRow, all_rows, main_rows
from shufflenet_mlflow.compare.verdict import names_of, verdict_of
from shufflenet_mlflow.data.thumbnails import thumbnail
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.runtime.pages import template
from shufflenet_mlflow.runtime.serialization import to_json
from shufflenet_mlflow.runtime.text import counted

PAGE, DOCUMENT = "compare.html", "compare.json"
PAGE_SUFFIXES = (".html", ".htm")

_MOST_CHANGES = 36
"""Images shown for each side of a test."""

_CURVE_LABELS = {
    "val/top1": "validation accuracy",
    "train/top1": "training accuracy",
    "val/loss": "validation loss",
    "train/loss": "training loss",
}


def write_page(comparison: Comparison, target: Path) -> list[Path]:
    """Write a page, or into a folder the page `compare.html` and all that it was made from as `compare.json`.

    Args:
        target: a file whose name ends in one of `PAGE_SUFFIXES`; otherwise a folder.

    Raises:
        ExportError: it cannot be written.
    """
    texts = {target: _page(comparison)}
    if target.suffix.lower() not in PAGE_SUFFIXES or target.is_dir():
        texts = {target / PAGE: texts[target], target / DOCUMENT: to_json(comparison.to_dict())}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8", "backslashreplace")
    except OSError as error:
        raise ExportError(
            f"cannot write to {str(target)!r}: {error.strerror}; --out names another folder or page",
            code="page-unwritable",
        ) from error
    return list(texts)


def _page(comparison: Comparison) -> str:
    names, deployed = names_of(comparison.runs), deployed_of(comparison)
    shown_curves = {curve.metric for curve in comparison.curves}
    return template("shufflenet_mlflow.compare", "compare.html.j2").render(
        comparison=comparison,
        names=names,
        date=datetime.now(timezone.utc).strftime("%-d %B %Y"),
        verdict=verdict_of(comparison),
        main_rows=main_rows(comparison),
        all_rows=all_rows(comparison),
        differing=[
            ShownRow(name, tuple(NONE if value is None else value for value in values))
            for name, values in comparison.differing.items()
        ],
        charts=draw(comparison),
        axis_labels=AXES,
        curve_labels={metric: label for metric, label in _CURVE_LABELS.items() if metric in shown_curves},
        deployed=deployed,
        symbols=dict(zip(kinds_of(deployed), cycle(MARKERS.values()))),
        tests=[_sections_of(test, comparison, names) for test in comparison.tests],
        began=[_date(run.started) for run in comparison.runs],
        counted=counted,
    )


def _date(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _sections_of(test: PairedTest, comparison: Comparison, names: tuple[str, ...]) -> dict[str, Any]:
    by_id = dict(zip((run.run_id for run in comparison.runs), names, strict=True))
    first, second = by_id[test.first.run_id], by_id[test.second.run_id]
    sides = (
        (first, test.only_first, lambda change: change.second),
        (second, test.only_second, lambda change: change.first),
    )
    return {
        "test": test,
        "first": first,
        "second": second,
        "sides": [
            {
                "name": name,
                "count": len(changes),
                "changes": [(change, _thumbnail(test, change)) for change in mixed(changes)[:_MOST_CHANGES]],
                "more": max(0, len(changes) - _MOST_CHANGES),
                "wrong": wrong,
            }
            for name, changes, wrong in sides
            if changes
        ],
    }


def _thumbnail(test: PairedTest, change: Change) -> str | None:
    """Return the image as a data URI; None if it is not on this machine."""
    if test.first.root is None:
        return None
    return thumbnail(str(Path(test.first.root) / change.path))
