"""Tables and documents on stdout: as wide as what is in them, or as the terminal."""

import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.cells import cell_len

from shufflenet_mlflow.runtime.serialization import to_json

GAP = "  "
SHORT_ID = 12
"""Characters of a run's ID that a narrow table keeps: commands take the beginning of one."""
NARROWEST = 10
"""Columns that a shortened text keeps."""


def cell(value: Any) -> str:
    """A value as it stands in a table; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    """Text on one line, without what a terminal would take for more than text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def print_json(document: Any) -> None:
    """One JSON document on stdout; what is not finite becomes null."""
    click.echo(to_json(document))


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None if it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, spare: Sequence[str] = ()) -> None:
    """Columns on stdout, numbers to the right.

    On a terminal that is too narrow, run IDs are shortened to what identifies them, then the `spare` columns are left
    out, in their order, then long texts are shortened. Pipes and files get everything.

    Args:
        spare: titles of columns that can be done without.
    """
    lines, left_out = fitted(titles, rows, terminal_width(), spare=spare)
    for line in lines:
        click.echo(line)
    if left_out:
        click.echo(f"left out for want of width: {', '.join(left_out)}; --json has them", err=True)


def fitted(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, *, spare: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The lines of a table in `width` columns, and the titles of what had to be left out."""
    columns = [list(column) for column in zip(titles, *rows, strict=True)]
    left_out: list[str] = []
    if width is not None:
        if _width(columns) > width:
            columns = [_short_ids(column) for column in columns]
        for title in spare:
            if _width(columns) > width and title in (column[0] for column in columns):
                columns = [column for column in columns if column[0] != title]
                left_out.append(title)
        columns = _shortened(columns, width)
    widths = [max(map(cell_len, column)) for column in columns]
    numeric = [len(column) > 1 and all(map(_is_number, column[1:])) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        padded = [_pad(text, wide, right) for text, wide, right in zip(row, widths, numeric, strict=True)]
        lines.append(GAP.join(padded).rstrip())
    return lines, left_out


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(cell_len, column)) for column in columns) + len(GAP) * (len(columns) - 1)


def _short_ids(column: list[str]) -> list[str]:
    return [column[0], *(text[:SHORT_ID] for text in column[1:])] if column[0] == "run_id" else column


def _shortened(columns: list[list[str]], width: int) -> list[list[str]]:
    """The widest columns cut to a common width, but for numbers, and none below `NARROWEST`."""
    limit = max((cell_len(text) for column in columns for text in column), default=0)
    while _width(columns) > width and limit > NARROWEST:
        limit -= 1
        columns = [[_cut(text, limit) for text in column] for column in columns]
    return columns


def _cut(text: str, limit: int) -> str:
    """The text, with an ellipsis in its middle if it is longer than `limit` columns."""
    if cell_len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[: limit - half - 1]}…{text[len(text) - half :]}"


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True
