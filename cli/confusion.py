"""The confusion matrix of an evaluation as a table of text."""

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shufflenet_mlflow.runtime.text import visible

if TYPE_CHECKING:
    from shufflenet_mlflow.evaluation.report import Report

MOST_CLASSES = 20
"""The most classes whose confusions are printed; the figure and the CSV file in the run have all."""
WIDEST_NAME = 24
NARROWEST_NAME = 6


def confusion_lines(report: "Report", width: int | None) -> list[str]:
    """Return a table with a row for each class of the images and a column for each class that the network answers.

    Columns have the numbers of the rows. If not all of them fit into `width` columns of the terminal, the classes with
    the most mistakes are shown, and the answers with other classes are added up.

    Args:
        width: None for no limit.
    """
    if not 2 <= len(report.classes) <= MOST_CLASSES:
        return []
    counts_CC = report.confusion_CC
    mistakes_C = counts_CC.sum(0) + counts_CC.sum(1) - 2 * counts_CC.diagonal()
    worst_first = sorted(range(len(report.classes)), key=lambda label: (-int(mistakes_C[label]), label))
    for kept in range(len(worst_first), 1, -1):
        shown = sorted(worst_first[:kept])
        lines = _lines(report, shown, width)
        if width is None or max(map(cell_len, lines)) <= width:
            return lines
    return []


def _lines(report: "Report", shown: Sequence[int], width: int | None) -> list[str]:
    """Return the table of some classes, with a column for the others."""
    counts_CC = report.confusion_CC
    cells = [[*(int(counts_CC[row, column]) for column in shown)] for row in shown]
    titles = [str(label + 1) for label in shown]
    if len(shown) < len(report.classes):
        titles.append("other")
        cells = [[*row, int(counts_CC[label].sum()) - sum(row)] for label, row in zip(shown, cells, strict=True)]
    texts = [[str(count) if count else "·" for count in row] for row in cells]
    beside = sum(2 + max(map(len, column)) for column in zip(titles, *texts, strict=True)) + len("99  ")
    widest = WIDEST_NAME if width is None else max(NARROWEST_NAME, min(WIDEST_NAME, width - beside))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("true \\ answered", no_wrap=True, max_width=widest, overflow="ellipsis")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for label, row in zip(shown, texts, strict=True):
        table.add_row(str(label + 1), Text(visible(report.classes[label])), *row)
    console = Console(file=StringIO(), width=1000, color_system=None)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
