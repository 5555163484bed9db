"""Tables and JSON documents on stdout."""

import shutil
import sys
from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from shufflenet_mlflow.runtime.serialization import to_json
from shufflenet_mlflow.runtime.text import visible

from .say import say

SHORT_ID = 12
"""Characters of a run's ID that a narrow table keeps; every command takes the first characters of one."""
NARROWEST = 10
"""Columns that a shortened text keeps."""

Columns = list[tuple[str, list[str]]]
"""Titles, which may be equal, and the texts below each."""


def cell(value: Any) -> str:
    """Return the text of a table's cell; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; numbers that are not finite become null."""
    say(*to_json(document).split("\n"))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, spare: Sequence[str] = ()) -> None:
    """Print columns on stdout, numbers aligned to the right.

    On a terminal that is too narrow, run IDs are shortened, then the `spare` columns are dropped, in their order, then
    long texts are cut. Pipes and files get everything.

    Args:
        spare: titles of columns that can be dropped.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines, dropped = fitted(titles, rows, width, spare=spare)
    for line in lines:
        say(line)
    if dropped:
        say(f"not shown, the terminal is too narrow: {', '.join(dropped)}; --json has them", err=True)


def fitted(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, *, spare: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the lines of a table in `width` columns, and the titles of the columns that were dropped."""
    columns = [(title, [row[number] for row in rows]) for number, title in enumerate(titles)]
    dropped: list[str] = []
    if width is not None:
        if _needed(columns) > width:
            columns = [(title, [_short(title, text) for text in texts]) for title, texts in columns]
        for title in spare:
            if _needed(columns) > width and title in titles:
                columns = [column for column in columns if column[0] != title]
                dropped.append(title)
    console = Console(file=StringIO(), width=width or _needed(columns), color_system=None)
    console.print(_table(columns))
    return [line.rstrip() for line in console.file.getvalue().splitlines()], dropped  # type: ignore[attr-defined]


def _short(title: str, text: str) -> str:
    return text[:SHORT_ID] if title == "run_id" else text


def _table(columns: Columns) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for title, texts in columns:
        if texts and all(map(_is_number, texts)):
            table.add_column(Text(title), justify="right", no_wrap=True)
        else:
            table.add_column(Text(title), min_width=min(NARROWEST, max(map(len, (title, *texts)))))
    for row in zip(*(texts for _, texts in columns), strict=True):
        table.add_row(*(Text(text, no_wrap=True, overflow="ellipsis") for text in row))
    return table


def _needed(columns: Columns) -> int:
    """Return the width in which nothing is cut."""
    console = Console(width=1_000_000)
    return Measurement.get(console, console.options, _table(columns)).maximum


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True
