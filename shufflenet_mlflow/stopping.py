"""Ending a run on request, at a moment when its state is whole."""

import os
import signal
from collections.abc import Callable
from types import FrameType

EXIT_BASE = 128
"""A shell's exit status for a process that ended by signal N is 128 + N."""


class StopRequested(Exception):
    """Raised at the next safe point after a signal arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        return EXIT_BASE + self.signum


class StopFlag:
    """Set by the first SIGINT or SIGTERM; work looks at it where it can stop. A second signal ends at once.

    Used as a context manager it installs the handlers, and puts the former ones back afterwards. Without that it
    is never set.

    Args:
        announce: told the signal's name when the first one arrives.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, announce: Callable[[str], None] = lambda _name: None) -> None:
        self.signum: int | None = None
        self._announce = announce
        self._before: dict[int, object] = {}

    def check(self) -> None:
        """Raise `StopRequested` if a signal has arrived."""
        if self.signum is not None:
            raise StopRequested(self.signum)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            # Files are written aside and renamed, so leaving at any instant is safe.
            os._exit(EXIT_BASE + signum)
        self.signum = signum
        self._announce(signal.Signals(signum).name)

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what `signal` returned
