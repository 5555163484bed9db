"""Stop a run on request, when its state is consistent."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_BASE = 128
"""A shell's exit status for a process that ended by signal N is 128 + N."""

GRACE_SECONDS = 20.0
"""Most schedulers leave 30 seconds between warning and end: this, and time to write a checkpoint."""

WARNING_SIGNAL: int | None = getattr(signal, "SIGUSR1", None)  # Windows has none
"""The signal by which Slurm announces the end; see `--signal` of `sbatch`."""


def exit_status(signum: int) -> int:
    """Return 130 for SIGINT, 143 for SIGTERM and for `WARNING_SIGNAL`."""
    return EXIT_BASE + (signal.SIGTERM if signum == WARNING_SIGNAL else signum)


_LAUNCHER_VARIABLES = ("RANK", "MLFLOW_RUN_ID")
"""Variables that `torchrun` and `mlflow run` set for the processes that they start."""

ECHO_SECONDS = 1.0
"""A launcher passes on a signal that its processes have received already: within this time it is the same signal."""


class StopRequested(Exception):
    """Raised at the next safe point after a signal arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """See `exit_status`."""
        return exit_status(self.signum)


class StopFlag:
    """Set by the first SIGINT, SIGTERM or SIGUSR1, and checked where work can stop; a second signal ends at once.

    A signal that another process of the same job has received only counts as the first one here.

    As a context manager, installs the handlers and restores the former ones afterwards. Otherwise it is never set.

    Args:
        announce: called with the name of the first signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, *([] if WARNING_SIGNAL is None else [WARNING_SIGNAL]))

    def __init__(self, announce: Callable[[str], None] = lambda _name: None) -> None:
        self.signum: int | None = None
        self.since: float | None = None
        """`time.monotonic()` of the signal."""
        self.grace = GRACE_SECONDS
        """Seconds after the signal for finishing work in progress."""
        self._received: float | None = None
        self._has_launcher = any(name in os.environ for name in _LAUNCHER_VARIABLES)
        self._announce = announce
        self._at_once = False
        self._before: dict[int, object] = {}

    def check(self) -> None:
        """Raise `StopRequested` if a signal has arrived."""
        if self.signum is not None:
            raise StopRequested(self.signum)

    def set(self, signum: int) -> None:
        """Act as if that signal had arrived here: it did in another process of the same job."""
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()

    @property
    def is_out_of_time(self) -> bool:
        """Whether a signal has arrived and the grace period after it is over."""
        return self.since is not None and time.monotonic() - self.since > self.grace

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, a signal raises `StopRequested` where it arrives; for work that may end anywhere."""
        self.check()
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before
        self.check()

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None:
            if self._has_launcher and now - self._received < ECHO_SECONDS:
                return
            # Files are written to temporary names, so exiting is safe at any time.
            os._exit(exit_status(signum))
        self._received = now
        if self.signum is not None:  # already stopping
            return
        self.set(signum)
        self._announce(signal.Signals(signum).name)
        if self._at_once:
            raise StopRequested(signum)

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what `signal` returned
