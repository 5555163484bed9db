"""Progress and messages of a running command, on stderr: live bars on a terminal, plain lines elsewhere."""

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from shlex import quote, split
from typing import TextIO

import click
from click.core import ParameterSource
from rich.console import Console, RenderableType
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
from rich.text import Text

from shufflenet_mlflow.evaluation.baseline import beside_majority
from shufflenet_mlflow.runtime.text import visible

from .options import verbosity
from .settings import sources

WIDEST_BAR = 24
BESIDE_BAR = 46
"""Columns beside the bar."""

LEVELS = {"verbose": logging.DEBUG, "quiet": logging.WARNING, None: logging.INFO}
"""Verbosity -> the lowest level of the library's log that is shown."""

logger = logging.getLogger("shufflenet_mlflow")


def make_console() -> Console:
    """Return a console of stderr: colours on a terminal unless `NO_COLOR` is set, lines of any length."""
    return Console(stderr=True, soft_wrap=True)


class _Bars(Progress):
    """A bar for each running phase, and a line of figures below them."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures, style="dim", no_wrap=True, overflow="ellipsis")


class _Screen:
    """Stderr, with bars at its foot while something runs."""

    def __init__(self) -> None:
        self.console = make_console()
        self.bars: _Bars | None = None

    def print(self, markup: str) -> None:
        """Print above the bars. Their thread must not draw meanwhile: rich would then erase as many lines as there
        were, and with them one that was to stay."""
        with nullcontext() if self.bars is None else self.bars.live._lock:
            self.console.print(visible(markup), highlight=False)


@cache
def _screen() -> _Screen:
    return _Screen()


class _Handler(logging.Handler):
    """Shows the log on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        text = escape(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = f"[yellow]Warning:[/] {text}"
        elif record.levelno < logging.INFO:
            text = f"[dim]{time.strftime('%H:%M:%S')} {text}[/]"
        _screen().print(text)


def setup_logging() -> None:
    """Show the library's log on stderr, as much of it as --verbose or --quiet asks for. Called once per command."""
    _screen.cache_clear()
    logger.handlers = [_Handler()]
    logger.propagate = False
    logger.setLevel(LEVELS[verbosity()])
    warnings.showwarning = _log_warning
    for option, source in sources().items():
        logger.debug("%s is from %s", option, source)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Put a library's warning in the log: it is about code, not about what the user can change."""
    logger.debug("%s: %s (%s:%d)", category.__name__, " ".join(str(message).split()), filename, lineno)


class _LivePhase:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self) -> None:
        self._progress.advance(self._task)


class _PlainPhase:
    def advance(self) -> None:
        pass


class ConsoleReporter:
    """Implements `shufflenet_mlflow.runtime.progress.Reporter`. Notes and warnings take the way of the log."""

    def __init__(self) -> None:
        self._screen = _screen()
        self._quiet = verbosity() == "quiet"
        # Not what FORCE_COLOR says: a log file may have colours, but nothing in it can be drawn over.
        self._live = sys.stderr.isatty() and not self._screen.console.is_dumb_terminal and not self._quiet
        self._total = self._first = 0
        self._began = time.monotonic()
        self._waiting = 0
        self._val_top1: float | None = None
        self._explained_dip = False

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[_LivePhase | _PlainPhase]:
        """Show a bar on a terminal; phases may be nested."""
        if name.rpartition(": ")[2] == "training":  # of a study: "trial 3: training"
            self._total, self._first, self._began = total, done, time.monotonic()
        if not self._live:
            yield _PlainPhase()
            return
        screen = self._screen
        outermost = screen.bars is None
        if screen.bars is None:
            screen.bars = _Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=max(4, min(WIDEST_BAR, screen.console.width - BESIDE_BAR))),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=screen.console,
                transient=True,
            )
            screen.bars.start()
        bars = screen.bars
        task = bars.add_task(name, total=total, completed=done)
        try:
            yield _LivePhase(bars, task)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                screen.bars = None

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """Show training metrics below the bar, or as a line; validations always as a line."""
        if "val/top1" in values:
            self._validation(iters, values)
            return
        text = (
            f"loss {values['train/loss']:.4f}  top1 {values['train/top1']:.4f}  lr {values['train/lr']:.5f}  "
            f"{values['train/images_per_second']:.0f} img/s"
        )
        if self._waiting:
            text += f"  {self._waiting} waiting for MLflow"
        if self._screen.bars is not None:
            self._screen.bars.figures = text + ("" if self._val_top1 is None else f"  val top1 {self._val_top1:.4f}")
        else:
            width = len(str(self._total))
            self._line(f"iteration {iters:>{width}}/{self._total}  {text}  ETA {self._eta(iters)}")

    def _validation(self, iters: int, values: Mapping[str, float]) -> None:
        """Show a validation; the first that is worse than the one before says what that can come from."""
        before, self._val_top1 = self._val_top1, values["val/top1"]
        accuracy = beside_majority(self._val_top1, values.get("val/majority"))
        text = f"[bold]validation[/] at iteration {iters}: top1 {accuracy}  "
        if "val/mean_class_accuracy" in values:
            text += f"mean class {values['val/mean_class_accuracy']:.4f}  "
        if "val/top5" in values:
            text += f"top5 {values['val/top5']:.4f}  "
        text += f"loss {values['val/loss']:.4f}"
        if before is not None and self._val_top1 < before and iters < self._total and not self._explained_dip:
            self._explained_dip = True
            text += "  [dim](may dip before BN statistics are re-estimated at the end)[/]"
        self._line(text)

    def _eta(self, iters: int) -> str:
        done = max(1, iters - self._first)
        seconds = round((time.monotonic() - self._began) / done * (self._total - iters))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def warn(self, text: str) -> None:
        logger.warning("%s", text)

    def waiting(self, count: int) -> None:
        """Show the count in the next line of progress."""
        self._waiting = count

    def _line(self, markup: str) -> None:
        if not self._quiet:
            self._screen.print(markup)


def next_steps(*commands: str) -> None:
    """Suggest what to do next, on stderr; nothing with --quiet."""
    if verbosity() == "quiet":
        return
    console = make_console()
    for number, command in enumerate(commands):
        text = visible(as_typed(command))
        console.print(f"[dim]{'     ' if number else 'next:'}[/] {escape(text)}", highlight=False)


def as_typed(command: str) -> str:
    """Return the command as it has to be typed here, with the path of `shufflenet` and the store."""
    return _with_path(_with_store(command))


def _with_path(command: str) -> str:
    """Return the command with the path of `shufflenet`, if it was called by that and is not on the PATH."""
    called = Path(sys.argv[0])
    if command.startswith("shufflenet ") and called.name == "shufflenet" and shutil.which("shufflenet") is None:
        return quote(str(called)) + command.removeprefix("shufflenet")
    return command


def _with_store(command: str) -> str:
    """Return the command with this one's --tracking-uri, if it was typed; variables and files apply again anyway."""
    ctx = click.get_current_context(silent=True)
    if ctx is not None and command.startswith("mlflow models serve -m models:"):
        from shufflenet_mlflow.tracking.uris import mlflow_command, uri_in_force

        return mlflow_command(command, uri_in_force(ctx.params.get("tracking_uri")))
    if ctx is None or ctx.get_parameter_source("tracking_uri") is not ParameterSource.COMMANDLINE:
        return command
    from shufflenet_mlflow.tracking.redaction import redact

    uri = quote(redact(ctx.params["tracking_uri"]))
    words, gap, comment = _divided(command)
    if not command.startswith("shufflenet ") or "--tracking-uri" in words or words.startswith("shufflenet train with"):
        return command
    return f"{words} --tracking-uri {uri}{gap}{comment}"


def _divided(command: str) -> tuple[str, str, str]:
    """Divide a suggestion at the four blanks before its comment; a quoted name may hold blanks of its own."""
    words, gap, comment = command.rpartition("    ")
    try:
        split(words)
    except ValueError:  # they end within quotes
        return command, "", ""
    return (words, gap, comment) if gap else (command, "", "")
