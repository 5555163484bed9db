"""`shufflenet predict`."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click.core import ParameterSource

from shufflenet_mlflow.csvtext import to_csv

from .options import (
    bad_image_option,
    cache_dir_option,
    debug_option,
    device_option,
    json_option,
    network_options,
    option,
    options,
    tracking_uri_option,
)

if TYPE_CHECKING:
    from shufflenet_mlflow.data.pictures import Pictures
    from shufflenet_mlflow.jobs.prediction import Predictions
    from shufflenet_mlflow.predict import Prediction

SHORTEST_PATH = 16
RUNNERS_UP = 20
"""Columns of a terminal that are left for the second label and its probability."""


@click.command()
@click.argument("ref")
@click.argument("images", metavar="IMAGE...", nargs=-1)
@option("--top", type=click.IntRange(min=1), help="Labels per image.  [default: 5]")
@option(
    "--format",
    type=click.Choice(["table", "csv", "json"]),
    help="What to print on stdout; table and csv as the images are done.  [default: table]",
)
@json_option
@options(*network_options)
@option("--batch-size", type=click.IntRange(min=1), help="Images at a time.  [default: 64]")
@option("--workers", type=click.IntRange(min=0), help="Decoding processes.  [default: none for a few images]")
@device_option
@bad_image_option
@tracking_uri_option
@cache_dir_option
@debug_option
@click.pass_context
def predict(ctx: click.Context, /, ref: str, images: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Say what the checkpoint REF takes each IMAGE for.

    REF is what `shufflenet eval` takes. IMAGE is a file, a folder (all images below it), a pattern in quotes, in which
    ** stands for folders of any depth, or - for standard input: one image, or paths, one a line or separated by NUL.

    \b
    Examples:
      shufflenet predict 0123456789abcdef0123456789abcdef cat.jpg dog.png
      shufflenet predict models:/pets@champion photos --top 1 --format csv > labels.csv
      shufflenet predict models:/pets@champion 'photos/**/*.jpg' --json
      find photos -newer labels.csv -name '*.jpg' -print0 | shufflenet predict models:/pets@champion -
      curl -s https://example.org/cat.jpg | shufflenet predict models:/pets@champion -
    """
    if not images:
        raise click.UsageError("Missing argument 'IMAGE...': a file, a folder, a pattern, or - for standard input.")
    chosen = values.pop("format")
    if as_json and chosen not in (None, "json") and ctx.get_parameter_source("format") is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--json and --format {chosen} exclude each other.")
    from shufflenet_mlflow.data.pictures import find_pictures

    pictures = find_pictures(images, _stdin)  # before torch is imported: a wrong path is named at once
    write = WRITERS["json" if as_json else chosen or "table"]
    out = _Output()

    from shufflenet_mlflow.jobs.prediction import PredictRequest, run_prediction

    from .console import ConsoleReporter
    from .stopping import stop_flag

    given = {name: value for name, value in values.items() if value is not None}
    with stop_flag() as stop:
        found = run_prediction(PredictRequest(ref, **given), pictures, reporter=ConsoleReporter(), stop=stop)
        with closing(found.batches):  # the processes that read images, too, if nobody takes what is printed
            write(found, pictures, out)


def _stdin() -> BinaryIO:
    """Nothing, where the process was started with a closed one."""
    return BytesIO() if sys.stdin is None else sys.stdin.buffer


class _Output:
    """Standard output: a terminal, on which a bar may stand below the rows, or a file, which gets UTF-8.

    Names of files that are no UTF-8 are written as the bytes that they are.
    """

    def __init__(self) -> None:
        # While its bar stands, rich puts another `sys.stdout` in place, which leads to stderr.
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


def _print_json(found: "Predictions", _pictures: "Pictures", out: _Output) -> None:
    """One document, once all is well."""
    from shufflenet_mlflow.jsontext import to_json

    out.write(to_json([prediction.to_dict() for batch in found.batches for prediction in batch]) + "\n")


def _print_csv(found: "Predictions", _pictures: "Pictures", out: _Output) -> None:
    """A line per image: path, label, probability, and so on down to the last of the labels asked for."""
    titles = ["path", "label", "probability"]
    for place in range(2, found.top + 1):
        titles += [f"label_{place}", f"probability_{place}"]
    _stream(to_csv([titles]), csv_rows, found, out)


def _stream(titles: str, rows: "Callable[[list[Prediction]], str]", found: "Predictions", out: _Output) -> None:
    """Rows as they come; nothing at all if the first batch fails."""
    for batch in found.batches:
        out.write(titles + rows(batch))
        titles = ""
    if titles:
        out.write(titles)


def csv_rows(batch: "list[Prediction]") -> str:
    """A line per image, without titles."""
    return to_csv([row.path, *(cell for entry in row.top for cell in entry)] for row in batch)


def _print_table(found: "Predictions", pictures: "Pictures", out: _Output) -> None:
    """A row per image, as wide as the longest path and label: both are known before the first row.

    On a terminal a row is one line: long paths lose their beginning, and labels that find no room are left out.
    """
    from .console import printable

    width = shutil.get_terminal_size().columns if out.is_terminal else None
    columns = _Columns.fitting(map(printable, pictures.paths()), map(printable, found.labels), width, found.top)
    titles = columns.line("path", "label", "probability", ["others"] if found.top > 1 else [])
    _stream(titles, lambda batch: "".join(map(columns.row, batch)), found, out)


@dataclass(frozen=True)
class _Columns:
    """A table's columns, in cells of a terminal: some letters take two."""

    path: int
    label: int
    width: int | None
    """Of a whole line; None for as much as it takes."""

    @classmethod
    def fitting(cls, paths: Iterator[str], labels: Iterator[str], width: int | None, top: int) -> "_Columns":
        from rich.cells import cell_len

        path, label = max(map(cell_len, paths)), max(map(cell_len, labels))
        if width is not None:
            label = min(label, width // 4)
            others = len("  probability") + (RUNNERS_UP if top > 1 else 0)
            path = min(path, max(SHORTEST_PATH, width - 2 - label - others))
        return cls(max(path, len("path")), max(label, len("label")), width)

    def row(self, prediction: "Prediction") -> str:
        """Of one image."""
        from .console import printable

        others = [f"{printable(label)} {probability:.4f}" for label, probability in prediction.top[1:]]
        return self.line(
            printable(prediction.path), printable(prediction.label), f"{prediction.probability:.4f}", others
        )

    def line(self, path: str, label: str, probability: str, others: Sequence[str]) -> str:
        """As many of `others` as there is room for."""
        from rich.cells import cell_len, set_cell_size

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


WRITERS: dict[str, Callable[["Predictions", "Pictures", _Output], None]] = {
    "table": _print_table,
    "csv": _print_csv,
    "json": _print_json,
}
