"""What a person is told while something runs: small protocols, and a version that logs."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

logger = logging.getLogger("shufflenet_mlflow")


class Phase(Protocol):
    """A stretch of work whose length is known."""

    def advance(self) -> None:
        """One more unit is done."""


class Reporter(Protocol):
    """Shows progress; none of it matters to the work itself."""

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        """A stretch of `total` units, of which `done` were done before."""

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """Metric points at iteration `iters`."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that needs attention."""

    def waiting(self, count: int) -> None:
        """So many entries have not reached MLflow, though they should have; 0 once all is well again."""


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
