"""The processes that decode images for a loader: they end with it, and their deaths are reported.

PyTorch raises its error for a dead worker from a signal handler, anywhere in the main process, and leaves the other
workers to be ended when Python exits; they ignore the signal that is meant to do so. Here a death is reported only
where batches are awaited, so that it never interrupts a training step or a save, and the others are killed.
"""

import atexit
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.signals import StopFlag

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

SHUTDOWN_SECONDS = 5.0
"""Time for workers to end by themselves."""

PATIENCE_SECONDS = 30.0
"""Time to wait for a batch before saying so."""

_WAY_OUT = "if memory ran out, lower --workers or --batch-size"
_PR_SET_PDEATHSIG = 1
_HAS_SIGCHLD = hasattr(signal, "SIGCHLD")  # Windows has none

_Handler = Callable[[int, FrameType | None], Any]


class _ReportDeaths:
    """PyTorch's handler of SIGCHLD, which raises an error for a dead worker: called only while batches are awaited.

    Args:
        raise_for_dead: PyTorch's handler.
        former: the handler before that, which is called at other times; None if there was none.
    """

    awaiting = False

    def __init__(self, raise_for_dead: _Handler, former: _Handler | None) -> None:
        self._raise_for_dead, self._former = raise_for_dead, former

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.awaiting or not _running:
            self._raise_for_dead(signum, frame)
        elif self._former is not None:
            self._former(signum, frame)

    @classmethod
    def install(cls, former: Any) -> None:
        """Take the place of PyTorch's handler, which a loader that starts workers in the main thread has installed."""
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not isinstance(handler, cls) and _is_main_thread():
            signal.signal(signal.SIGCHLD, cls(handler, former if callable(former) and former != handler else None))


@contextmanager
def _deaths_reported() -> Iterator[None]:
    """Within the block, and nowhere else, raise RuntimeError if a worker is dead, or dies.

    Only the main thread can be interrupted; in others PyTorch looks after its workers every five seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD) if _HAS_SIGCHLD and _is_main_thread() else None
    if not isinstance(handler, _ReportDeaths):
        yield
        return
    handler.awaiting = True
    try:
        handler(signal.SIGCHLD, None)  # one may have died before
        yield
    finally:
        handler.awaiting = False


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _settle_temporary_names() -> None:
    """Let `tempfile` choose its folder and names before a process is forked.

    It does that once, under a lock. A process that is forked while another thread does it inherits the lock, taken,
    and waits for it when it passes its first batch on: for ever, as was seen in a run that had just been resumed.
    """
    with contextlib.suppress(OSError, AttributeError):
        tempfile.gettempdir()
        tempfile._get_candidate_names()  # type: ignore[attr-defined]


class LoadedBatches(Generic[Value]):
    """Iterate over a loader's batches; start its workers, and end them.

    Args:
        loader: yields batches.
        stop: a signal ends the wait for a batch.
    """

    def __init__(self, loader: "DataLoader[Any]", stop: StopFlag) -> None:
        self._stop = stop
        self._iterator: Iterator[Value] | None = None
        self._awaited_since: float | None = None
        self._closed = threading.Event()
        former = signal.getsignal(signal.SIGCHLD) if _HAS_SIGCHLD else None
        before = set(multiprocessing.active_children())
        if loader.num_workers:
            _settle_temporary_names()
        try:
            self._iterator = iter(loader)
        except OSError as error:
            self._workers = set(multiprocessing.active_children()) - before
            self._kill()
            raise DataError(
                f"cannot start {loader.num_workers} data loading processes ({error.strerror or error}); "
                "lower --workers",
                code="workers-not-started",
            ) from error
        self._workers = set(multiprocessing.active_children()) - before if loader.num_workers else set()
        if self._workers:
            _running.add(self)
            if _HAS_SIGCHLD:
                _ReportDeaths.install(former)
            threading.Thread(target=self._report_waits, name="watching for images", daemon=True).start()

    def next(self) -> Value | None:
        """Return the next batch; None if there is none left.

        Raises:
            DataError: a worker died, or memory ran out in one.
            StopRequested: a signal has arrived.
        """
        if self._iterator is None:
            return None
        self._awaited_since = time.monotonic()
        try:
            with self._stop.at_once(), _deaths_reported():
                return next(self._iterator, None)
        except Exception as error:  # whatever half a message leads to
            death = worker_death(error)
            if death is None and (self._is_lost_connection(error) or self._has_lost_one()):
                death = _death(f"{type(error).__name__} when a batch was fetched from it")
            if death is None:
                raise
            raise death from error
        finally:
            self._awaited_since = None

    def _is_lost_connection(self, error: Exception) -> bool:
        """Whether a worker has gone without its end being noted yet, which can take seconds on a busy machine."""
        is_own = not str(error).startswith("Caught ")  # not what a worker has passed on
        return bool(self._workers) and is_own and isinstance(error, (EOFError, ConnectionError, FileNotFoundError))

    def _has_lost_one(self) -> bool:
        """Whether a worker is dead, or dying: its connections close a moment before."""
        until = time.monotonic() + SHUTDOWN_SECONDS
        while all(worker.is_alive() for worker in self._workers):
            if not self._workers or time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def _report_waits(self) -> None:
        """Report once that batches do not arrive: a slow disk is waited for, and so is a stopped process."""
        while not self._closed.wait(1.0):
            since = self._awaited_since
            if since is not None and time.monotonic() - since > PATIENCE_SECONDS:
                logger.warning(
                    "no images for %d s: their disk does not answer, or the processes that read it are stopped; "
                    "still waiting",
                    PATIENCE_SECONDS,
                )
                return

    def close(self, *, at_once: bool = False) -> None:
        """End the workers.

        Args:
            at_once: kill them; otherwise they have `SHUTDOWN_SECONDS`.
        """
        iterator, self._iterator = self._iterator, None
        self._closed.set()
        if iterator is None or not self._workers:
            return
        if at_once:
            self._kill()
        late = threading.Timer(SHUTDOWN_SECONDS, self._kill)
        late.daemon = True
        late.start()
        # In a thread, since a killed worker may leave a lock behind that PyTorch then waits for.
        closing = threading.Thread(target=_shut_down, args=(iterator,), daemon=True)
        closing.start()
        closing.join(2 * SHUTDOWN_SECONDS)
        late.cancel()
        self._kill()
        if not closing.is_alive():  # else PyTorch still has them on its list
            _running.discard(self)

    def _kill(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError, ValueError):
                worker.kill()


def _shut_down(iterator: object) -> None:
    """Have PyTorch end an iterator's workers; whatever it meets with dead ones is no error."""
    with contextlib.suppress(Exception):
        getattr(iterator, "_shutdown_workers", lambda: None)()


_running: set[LoadedBatches[Any]] = set()
"""Iterators with workers, which would keep Python from exiting."""


@atexit.register  # after multiprocessing's own, so it runs before
def _close_all() -> None:
    for batches in list(_running):
        batches.close(at_once=True)


def start_worker(parent: int, dies_with_parent: bool) -> None:
    """Prepare a worker: it ignores signals such as Ctrl-C, which reach the whole group, and ends with its parent.

    Args:
        parent: process ID of the main process.
        dies_with_parent: whether the thread that started it lives as long as the parent; Linux looks at the thread.
    """
    for signum in StopFlag.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def worker_death(error: BaseException) -> DataError | None:
    """Return the DataError for PyTorch's report of a dead worker, or of one without memory; None for other errors."""
    text = str(error)
    if "DataLoader worker" not in text:
        return None
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return _death("it found no memory")
    if text.startswith("Caught ") and not isinstance(error, RuntimeError):
        return None
    return _death(text.splitlines()[0])


def _death(reason: str) -> DataError:
    return DataError(f"a data loading process died ({reason}); {_WAY_OUT}", code="worker-died")
