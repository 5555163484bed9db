"""Progress reports: small protocols, and implementations that log."""

import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

logger = logging.getLogger("shufflenet_mlflow")


class Phase(Protocol):
    """Work of known length."""

    def advance(self) -> None:
        """Count one more unit as done."""


class Reporter(Protocol):
    """Shows progress; none of it matters to the work itself."""

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        """Begin work of `total` units, of which `done` are done."""

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """Report metrics at iteration `iters`."""

    def note(self, text: str) -> None:
        """Report something worth knowing."""

    def warn(self, text: str) -> None:
        """Report something that needs attention."""

    def waiting(self, count: int) -> None:
        """Report how many journal entries are overdue at MLflow; 0 once all have arrived."""


class SilentPhase:
    """Shows nothing."""

    def advance(self) -> None:
        pass

    def __enter__(self) -> "SilentPhase":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class LoggingReporter:
    """Reports through `logging`: what library users get by default."""

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        logger.info("%s: %d of %d", name, done, total)
        return SilentPhase()

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        logger.info(
            "iteration %d: %s",
            iters,
            ", ".join(f"{name} {value:.4g}" for name, value in values.items()),
        )

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def warn(self, text: str) -> None:
        logger.warning("%s", text)

    def waiting(self, count: int) -> None:
        pass


class PrintingReporter(LoggingReporter):
    """Prints a line for each report on stderr, for scripts and notebooks."""

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        return SilentPhase()

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        self._print(f"iteration {iters}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}")

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"Warning: {text}")

    def _print(self, text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def reporter_of(progress: "bool | Reporter") -> "Reporter":
    """Return the reporter that a library function's argument `progress` means: print, log, or what is given."""
    if isinstance(progress, bool):
        return PrintingReporter() if progress else LoggingReporter()
    return progress


class FollowerReporter(LoggingReporter):
    """Reports only what the leader of a distributed job cannot know, such as files that this process cannot read.

    Args:
        rank: this process's number.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        """Show nothing: the leader shows it."""
        return SilentPhase()

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """Show nothing: the leader shows them."""

    def note(self, text: str) -> None:
        """Show nothing: the leader says it."""

    def warn(self, text: str) -> None:
        super().warn(f"process {self._rank}: {text}")
