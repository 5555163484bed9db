"""Output of `shufflenet predict`: a table, CSV or JSON, image by image."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from rich.cells import cell_len, set_cell_size

from shufflenet_mlflow.runtime.serialization import to_csv, to_json
from shufflenet_mlflow.runtime.text import visible

if TYPE_CHECKING:
    from shufflenet_mlflow.data.pictures import Pictures
    from shufflenet_mlflow.evaluation.prediction import Prediction
    from shufflenet_mlflow.workflows.predict import Predictions

SHORTEST_PATH = 16
RUNNERS_UP = 20
"""Columns of a terminal that are reserved for the second label and its probability."""


class Output:
    """Standard output: a terminal, perhaps with a bar below the rows, or a file in UTF-8.

    File names that are not UTF-8 are written byte for byte.
    """

    def __init__(self) -> None:
        # While a bar is shown, rich replaces `sys.stdout` by one that leads to stderr.
        self._file = sys.stdout
        self.is_terminal = sys.stdout is not None and sys.stdout.isatty()

    def write(self, text: str) -> None:
        try:
            encoded = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # a label from a checkpoint may hold what no file name can
            encoded = text.encode("utf-8", "replace")
        if self.is_terminal:
            sys.stdout.write(encoded.decode("utf-8", "replace"))  # click would go round rich
            sys.stdout.flush()
        else:
            click.echo(encoded, file=self._file, nl=False)


def _print_json(found: "Predictions", _pictures: "Pictures", out: Output) -> None:
    """Print one document after the last image."""
    out.write(to_json([prediction.to_dict() for batch in found.batches for prediction in batch]) + "\n")


def _print_csv(found: "Predictions", _pictures: "Pictures", out: Output) -> None:
    """Print a line per image: path, then each label with its probability."""
    titles = ["path", "label", "probability"]
    for rank in range(2, found.top + 1):
        titles += [f"label_{rank}", f"probability_{rank}"]
    out.write(to_csv([titles]))  # for programs, even if the first image is broken
    _stream("", csv_rows, found, out)


def _stream(titles: str, rows: "Callable[[list[Prediction]], str]", found: "Predictions", out: Output) -> None:
    """Print rows batch by batch; nothing at all if the first batch fails."""
    for batch in found.batches:
        out.write(titles + rows(batch))
        titles = ""
    if titles:
        out.write(titles)


def csv_rows(batch: "list[Prediction]") -> str:
    """Return a line per image, without titles."""
    return to_csv([row.path, *(cell for entry in row.top for cell in entry)] for row in batch)


def _print_table(found: "Predictions", pictures: "Pictures", out: Output) -> None:
    """Print a row per image, as wide as the longest path and label: both are known before the first row.

    On a terminal a row is one line: long paths lose their beginning, and labels that do not fit are dropped.
    """
    width = shutil.get_terminal_size().columns if out.is_terminal else None
    columns = _Columns.fitting(map(visible, pictures.paths()), map(visible, found.labels), width, found.top)
    titles = columns.line("path", "label", "probability", ["others"] if found.top > 1 else [])
    _stream(titles, lambda batch: "".join(map(columns.row, batch)), found, out)


@dataclass(frozen=True)
class _Columns:
    """Widths of a table, in columns of the terminal: some letters take two."""

    path: int
    label: int
    width: int | None
    """Characters of a whole line; None for no limit."""

    @classmethod
    def fitting(cls, paths: Iterator[str], labels: Iterator[str], width: int | None, top: int) -> "_Columns":
        path, label = max(map(cell_len, paths)), max(map(cell_len, labels))
        if width is not None:
            label = min(label, width // 4)
            others = len("  probability") + (RUNNERS_UP if top > 1 else 0)
            path = min(path, max(SHORTEST_PATH, width - 2 - label - others))
        return cls(max(path, len("path")), max(label, len("label")), width)

    def row(self, prediction: "Prediction") -> str:
        """Return the row of one image."""
        others = [f"{visible(label)} {probability:.4f}" for label, probability in prediction.top[1:]]
        return self.line(visible(prediction.path), visible(prediction.label), f"{prediction.probability:.4f}", others)

    def line(self, path: str, label: str, probability: str, others: Sequence[str]) -> str:
        """Return a line with as many of `others` as fit."""
        if cell_len(path) > self.path:
            while cell_len(path) >= self.path:
                path = path[1:]
            path = f"…{path}"
        if cell_len(label) > self.label:
            label = f"{set_cell_size(label, self.label - 1)}…"
        shown = f"{set_cell_size(path, self.path)}  {set_cell_size(label, self.label)}  {probability:>11}"
        for other in others:
            if self.width is not None and cell_len(shown) + 2 + cell_len(other) > self.width:
                break
            shown += f"  {other}"
        return shown.rstrip() + "\n"


WRITERS: dict[str, Callable[["Predictions", "Pictures", Output], None]] = {
    "table": _print_table,
    "csv": _print_csv,
    "json": _print_json,
}
