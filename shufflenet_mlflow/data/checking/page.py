"""Write a report as one self-contained HTML page, with the images that it is about."""

from pathlib import Path
from typing import Any

from shufflenet_mlflow.data.checking.folders import Part
from shufflenet_mlflow.data.checking.images import Look
from shufflenet_mlflow.data.checking.report import CheckReport, Finding
from shufflenet_mlflow.data.thumbnails import thumbnail
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.runtime.files import write_atomically
from shufflenet_mlflow.runtime.pages import template
from shufflenet_mlflow.runtime.text import counted

MOST_GROUPS = 60
MOST_IMAGES = 8
"""Groups shown of a finding, and images of a group."""
MOST_CLASSES = 60
EXAMPLES = 8
"""Classes of a part that are shown, and images of each."""


def write_page(report: CheckReport, path: Path) -> None:
    """Write the page.

    Raises:
        ExportError: the file cannot be written.
    """
    page = template("shufflenet_mlflow.data.checking", "check.html.j2").render(
        report=report,
        counted=counted,
        findings=[_section(finding) for finding in report.findings],
        parts=[_examples(report, part) for part in report.parts],
    )
    try:
        write_atomically(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))
    except OSError as error:
        raise ExportError(
            f"cannot write {str(path)!r}: {error.strerror}; --out names another file", code="check-page-unwritable"
        ) from error


def _section(finding: Finding) -> dict[str, Any]:
    shown = finding.groups[:MOST_GROUPS]
    return {
        "finding": finding,
        "groups": [
            {"images": [_picture(look) for look in group[:MOST_IMAGES]], "more": len(group) - MOST_IMAGES}
            for group in shown
        ],
        "more": len(finding.groups) - len(shown),
    }


def _picture(look: Look) -> dict[str, Any]:
    return {"look": look, "uri": thumbnail(look.image.file) if look.problem is None else None}


def _examples(report: CheckReport, part: Part) -> dict[str, Any]:
    """Return the table of a part's classes, with evenly spaced examples of each."""
    counts = report.counts(part)
    rows = []
    for name, count in list(counts.items())[:MOST_CLASSES]:
        looks = [look for look in report.looks_of(part) if look.image.class_name == name]
        step = max(1, -(-len(looks) // EXAMPLES))
        rows.append({"name": name, "count": count, "images": [_picture(look) for look in looks[::step]]})
    return {"part": part, "rows": rows, "more": len(counts) - len(rows), "sizes": report.sizes(part)}
