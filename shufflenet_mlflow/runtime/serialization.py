"""Plain values as JSON and CSV that every reader accepts."""

import csv
import json
import math
from collections.abc import Iterable
from typing import Any


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
    """Return CSV with one line per row."""
    lines = _Lines()
    csv.writer(lines).writerows(rows)
    return "".join(lines)


class _Lines(list[str]):
    """Collects lines with Unix endings; a `csv.writer` told to end lines so would leave carriage returns unquoted."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")
