"""Write a comparison as files: a self-contained HTML page, JSON, and the curves as PNG."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from shufflenet_mlflow.compare.comparison import Comparison
from shufflenet_mlflow.compare.curves import AXES, curves_figure
from shufflenet_mlflow.compare.paired import Change, PairedTest
from shufflenet_mlflow.data.decode import UnreadableImageError, decode
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.evaluation.plots import write_figure
from shufflenet_mlflow.runtime.serialization import to_json

PAGE, DOCUMENT = "compare.html", "compare.json"

_MOST_CHANGES = 60
"""Images shown for each side of a test."""

_THUMBNAIL = 96


def write_page(comparison: Comparison, directory: Path) -> list[Path]:
    """Write `compare.html`, `compare.json` and a PNG for each of `AXES` that has curves.

    Raises:
        ExportError: the folder cannot be written.
    """
    written: list[Path] = []
    drawings: list[tuple[str, Markup]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (label, _) in AXES.items():
            figure = curves_figure(comparison, name)
            if figure is None:
                continue
            written.append(directory / f"curves-{name}.png")
            write_figure(figure, written[-1])
            drawing = io.StringIO()
            write_figure(figure, drawing, "svg")
            drawings.append((label, Markup(_without_prologue(drawing.getvalue()))))  # noqa: S704 - drawn here
        environment = Environment(
            loader=PackageLoader("shufflenet_mlflow.compare", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template("compare.html.j2").render(
            comparison=comparison,
            drawings=drawings,
            tests=[_sections_of(test) for test in comparison.tests],
        )
        for name, text in ((PAGE, page), (DOCUMENT, to_json(comparison.to_dict()))):
            written.append(directory / name)
            written[-1].write_text(text, "utf-8", "backslashreplace")
    except OSError as error:
        raise ExportError(
            f"cannot write to {str(directory)!r}: {error.strerror}; --out names another folder", code="page-unwritable"
        ) from error
    return written


def _without_prologue(svg: str) -> str:
    """Return an SVG drawing without its XML prologue, which is invalid inside a page."""
    return svg[svg.index("<svg") :]


def _sections_of(test: PairedTest) -> dict[str, Any]:
    sides = (
        ("only the first is right", test.only_first),
        ("only the second is right", test.only_second),
    )
    return {
        "test": test,
        "sides": [
            {
                "title": title,
                "count": len(changes),
                "changes": [(change, _thumbnail(test, change)) for change in changes[:_MOST_CHANGES]],
            }
            for title, changes in sides
        ],
    }


def _thumbnail(test: PairedTest, change: Change) -> str | None:
    """Return the image as a data URI; None if it is not on this machine."""
    if test.first.root is None:
        return None
    try:
        image = Image.fromarray(decode(str(Path(test.first.root) / change.path)))
    except UnreadableImageError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
