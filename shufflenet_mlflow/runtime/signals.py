"""Stop a run on request, when its state is consistent."""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_BASE = 128
"""A shell's exit status for a process that ended by signal N is 128 + N."""

GRACE_SECONDS = 20.0
"""Most schedulers leave 30 seconds between warning and end: this, and time to write a checkpoint."""

LEAVE_SECONDS = 1.0
"""Time after a second signal for noting how the run ended."""

_PRINT_SECONDS = 0.05
"""Time for the main thread to print the first of two signals that arrive together, so that it is not the last line."""

_FINALIZER_SECONDS = 0.01
"""Time for a finalizer to end."""

WARNING_SIGNAL: int | None = getattr(signal, "SIGUSR1", None)  # Windows has none
"""The signal by which Slurm announces the end; see `--signal` of `sbatch`."""

HANG_UP: int | None = getattr(signal, "SIGHUP", None)
"""The signal that a closed terminal sends; `nohup` has it ignored."""

PARENT = os.getppid()
"""The process that started this one; `os.getppid()` is another one once it is gone."""


def exit_status(signum: int) -> int:
    """Return 129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM and for `WARNING_SIGNAL`."""
    return EXIT_BASE + (signal.SIGTERM if signum == WARNING_SIGNAL else signum)


_LAUNCHER_VARIABLES = ("RANK", "MLFLOW_RUN_ID")
"""Variables that `torchrun` and `mlflow run` set for the processes that they start."""

ECHO_SECONDS = 1.0
"""A launcher passes on a signal that its processes have received already: within this time it is the same signal."""


class StopRequested(BaseException):
    """Raised at the next safe point after a signal arrived; like KeyboardInterrupt no `except Exception` takes it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """See `exit_status`."""
        return exit_status(self.signum)


class StopFlag:
    """Set by the first SIGINT, SIGTERM, SIGHUP or SIGUSR1, and checked where work can stop; a second one ends at once.

    A signal that another process of the same job has received only counts as the first one here.

    As a context manager, installs the handlers and restores the former ones afterwards. Otherwise it is never set.

    Args:
        announce: called with the name of the first signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, *(number for number in (WARNING_SIGNAL, HANG_UP) if number is not None))

    def __init__(self, announce: Callable[[str], None] = lambda _name: None) -> None:
        self.signum: int | None = None
        self.since: float | None = None
        """`time.monotonic()` of the signal."""
        self.grace = GRACE_SECONDS
        """Seconds after the signal for finishing work in progress."""
        self.on_leave: Callable[[], object] = lambda: None
        """Called by the second signal, in a thread, for at most `LEAVE_SECONDS`: notes how the run ended."""
        self.resume_ref: str | None = None
        """Where the run can be resumed from; None if there is none."""
        self.last_words: Callable[[], object] = lambda: None
        """Called by the second signal, in a thread, before `on_leave`."""
        self._count = _Count()
        self._announce = announce
        self._at_once = False
        self._before: dict[int, object] = {}
        self._listener: _Listener | None = None
        self._hook_before = sys.unraisablehook
        self._was_lost = False
        self._own_signals = 0

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
        """Handle the first signal, in the main thread; `_heard` counts them."""
        if self.signum is not None:  # already stopping
            if self._was_lost and self._at_once:
                self._was_lost = False
                raise StopRequested(self.signum)
            return
        self.set(signum)
        self._announce(signal.Signals(signum).name)
        if self._at_once:
            raise StopRequested(signum)

    def _raise_again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Raise `StopRequested` once more: Python drops what is raised in a finalizer, where a signal may arrive."""
        if issubclass(unraisable.exc_type, StopRequested) and self.signum is not None:
            self._was_lost = True
            self._own_signals += 1
            again = threading.Timer(_FINALIZER_SECONDS, _thread.interrupt_main, (self.signum,))
            again.daemon = True
            again.start()
        else:
            self._hook_before(unraisable)

    def _heard(self, signum: int) -> None:
        """Count a signal, in the listening thread: the main one may be waiting in native code, for ever."""
        if self._own_signals:
            self._own_signals -= 1
            return
        if signum not in self._before or not self._count.is_one_more():
            return
        if self._count.signals == 2:  # whatever happens in that thread, it ends the process
            threading.Thread(target=self._leave, args=(signum,), daemon=True).start()

    def _leave(self, signum: int) -> None:
        """End the process. Files are written to temporary names, so that is safe at any time."""
        self._announce = lambda _name: None
        time.sleep(_PRINT_SECONDS)
        for act in (self.last_words, self.on_leave):
            noting = threading.Thread(target=_without_errors, args=(act,), daemon=True)
            noting.start()
            noting.join(LEAVE_SECONDS)
        os._exit(exit_status(signum))

    def __enter__(self) -> "StopFlag":
        ignored = [HANG_UP] if HANG_UP is not None and signal.getsignal(HANG_UP) == signal.SIG_IGN else []
        self._listener = _Listener(self._heard)
        numbers = [number for number in self.SIGNALS if number not in ignored]
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(self, *_exception: object) -> None:
        sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what `signal` returned
        if self._listener is not None:
            self._listener.close()


class CallersStopFlag(StopFlag):
    """The flag of a function in somebody else's process, which goes on: a second signal raises KeyboardInterrupt.

    Only the main thread can handle signals; in any other they are left alone.
    """

    def __init__(self, announce: Callable[[str], None] = lambda _name: None) -> None:
        super().__init__(announce)
        self.received: int | None = None
        """The signal that has arrived."""

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.received = signum
        super()._receive(signum, frame)

    def _heard(self, signum: int) -> None:
        """Do nothing: the process is not ours to end."""

    def __enter__(self) -> "CallersStopFlag":
        if threading.current_thread() is threading.main_thread():
            super().__enter__()
        return self

    def raise_received(self, text: str) -> None:
        """Raise what ends the caller's program, too, if a signal has arrived; once everything is saved.

        Args:
            text: says how to go on.

        Raises:
            KeyboardInterrupt: it was SIGINT.
            SystemExit: another one, with `exit_status`.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(text)
        if self.received is not None:
            raise SystemExit(exit_status(self.received))


class _Count:
    """Counts signals; what a launcher repeats counts once."""

    signals = 0

    def __init__(self) -> None:
        self._first = 0.0
        self._has_launcher = any(map(os.environ.get, _LAUNCHER_VARIABLES))

    def is_one_more(self) -> bool:
        """Count a signal that has arrived now; return whether it counts."""
        now = time.monotonic()
        if self.signals and self._has_launcher and now - self._first < ECHO_SECONDS:
            return False
        if not self.signals:
            self._first = now
        self.signals += 1
        return True


class _Listener:
    """A thread that hears of every signal of this process at once, even while the main thread is in native code."""

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard = heard
        self._reading, self._writing = os.pipe()
        with contextlib.suppress(AttributeError):  # Windows, before Python 3.12
            os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="listening for signals", daemon=True)
        self._thread.start()
        _listening.append(self)

    def _listen(self) -> None:
        while numbers := os.read(self._reading, 64):
            for number in numbers:
                if number == 0:
                    return
                self._heard(number)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        _listening.remove(self)
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)


_listening: list[_Listener] = []


def _block_in_fork() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, StopFlag.SIGNALS)


def _unblock_in_parent() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopFlag.SIGNALS)


def _ignore_in_child() -> None:
    """Let a process that decodes images ignore what reaches the whole process group: the main process handles it."""
    if _listening:
        _listening.clear()
        signal.set_wakeup_fd(-1)
        for signum in StopFlag.SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopFlag.SIGNALS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_block_in_fork, after_in_parent=_unblock_in_parent, after_in_child=_ignore_in_child)


def _without_errors(act: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        act()
