"""What a person sees while a job runs: a live display on a terminal, plain lines elsewhere. All of it on stderr."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shufflenet_mlflow.jsontext import to_json


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        self._console.print(f"[{style}]{prefix}{escape(record.getMessage())}[/]", highlight=False)


class _LivePhase:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self) -> None:
        self._progress.advance(self._task)


class _PlainPhase:
    def advance(self) -> None:
        pass


class ConsoleReporter:
    """Implements `shufflenet_mlflow.reporting.Reporter`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self._progress: Progress | None = None
        self._total = self._first = 0
        self._began = time.monotonic()
        self._waiting = 0
        logger = logging.getLogger("shufflenet_mlflow")
        logger.handlers = [_Handler(self.console)]
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[_LivePhase | _PlainPhase]:
        """A bar on a terminal; phases may lie within one another."""
        if name == "training":
            self._total, self._first, self._began = total, done, time.monotonic()
        if not self.console.is_terminal:
            yield _PlainPhase()
            return
        outermost = self._progress is None
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        progress = self._progress
        task = progress.add_task(name, total=total, completed=done, detail="")
        try:
            yield _LivePhase(progress, task)
        finally:
            progress.remove_task(task)
            if outermost:
                progress.stop()
                self._progress = None

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """Training metrics beside the bar, or as a line; validations always as a line."""
        if "val/top1" in values:
            self._line(
                f"[bold]validation[/] at iteration {iters}: top1 {values['val/top1']:.4f}  "
                f"top5 {values['val/top5']:.4f}  loss {values['val/loss']:.4f}"
            )
            return
        text = (
            f"loss {values['train/loss']:.4f}  top1 {values['train/top1']:.4f}  lr {values['train/lr']:.5f}  "
            f"{values['train/images_per_second']:.0f} img/s"
        )
        if self._waiting:
            text += f"  {self._waiting} waiting for MLflow"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], detail=text)
        else:
            width = len(str(self._total))
            self._line(f"iteration {iters:>{width}}/{self._total}  {text}  ETA {self._eta(iters)}")

    def _eta(self, iters: int) -> str:
        done = max(1, iters - self._first)
        seconds = round((time.monotonic() - self._began) / done * (self._total - iters))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def note(self, text: str) -> None:
        self._line(escape(text))

    def warn(self, text: str) -> None:
        self._line(f"[yellow]Warning:[/] {escape(text)}")

    def waiting(self, count: int) -> None:
        """Shown in the next line of progress."""
        self._waiting = count

    def _line(self, markup: str) -> None:
        self.console.print(markup, highlight=False)


def cell(value: Any) -> str:
    """A value as it stands in a table; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    """Text on one line, without what a terminal would take for more than text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns on stdout, as wide as what is in them; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    numeric = [all(_is_number(text) for text in column) for column in zip(*rows, strict=True)] or [False] * len(widths)
    for row in (titles, *rows):
        aligned = [
            f"{text:>{width}}" if right else f"{text:<{width}}"
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def print_json(document: Any) -> None:
    """One JSON document on stdout; what is not finite becomes null."""
    click.echo(to_json(document))
