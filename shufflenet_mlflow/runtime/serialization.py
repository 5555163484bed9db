"""Plain values as JSON and CSV that every reader accepts."""

import csv
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from shufflenet_mlflow.runtime.text import FILE_NAME_BYTES, visible


def to_json(value: Any) -> str:
    """Return indented JSON. Numbers that are not finite become null, because JSON has no NaN."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def to_csv(rows: Iterable[Iterable[object]]) -> str:
    """Return CSV with one line per row; names in it control no terminal, begin no line and are no formulas.

    Bytes of file names that are not UTF-8 are kept, so that the files can be found.
    """
    lines = _Lines()
    csv.writer(lines).writerows([_clean(cell) for cell in row] for row in rows)
    return "".join(lines)


_FORMULA = re.compile(r"'*\s*[=+\-@\t\r＝＋－＠]")  # noqa: RUF001 - full-width ones count as well
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _clean(cell: object) -> object:
    """Escape controls, and put an apostrophe before text that a spreadsheet would compute; numbers stay numbers."""
    if not isinstance(cell, str):
        return cell
    cell = visible(cell, keep=FILE_NAME_BYTES)
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def from_csv_cell(cell: str) -> str:
    """Return the text that `to_csv` was given, with controls as their escapes, as older files do not have them."""
    return visible(cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell, keep=FILE_NAME_BYTES)


class _Lines(list[str]):
    """Collects lines with Unix endings; a `csv.writer` told to end lines so would leave carriage returns unquoted."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")
