"""Plain values as CSV that every reader takes."""

import csv
from collections.abc import Iterable


def to_csv(rows: Iterable[Iterable[object]]) -> str:
    """A line per row."""
    lines = _Lines()
    csv.writer(lines).writerows(rows)
    return "".join(lines)


class _Lines(list[str]):
    """Lines that end as on Unix. If `csv` were told to end them so, it would leave carriage returns unquoted."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")
