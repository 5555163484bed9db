"""Messages that signals print; light, so that they are in place before torch is imported."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from functools import partial
from shlex import quote
from typing import NoReturn

from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import visible

EXIT_SECONDS = 10.0
"""Time for Python to end its threads and processes once a command is done."""

_SHOW_CURSOR = "\x1b[?25h"


def stop_flag(what_happens: str = "stopping; again to stop at once") -> StopFlag:
    """Return a flag that prints what signals lead to."""

    def announce(name: str) -> None:
        _write(f"\n{name}: {what_happens}\n")

    stop = StopFlag(announce)
    stop.last_words = partial(say_how_to_go_on, stop, "shufflenet train --resume {}")
    return stop


def say_how_to_go_on(stop: StopFlag, command: str) -> None:
    """Print the last line of a process that ends at once.

    Args:
        command: resumes the run, whose name goes into the braces.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        _write(_SHOW_CURSOR)  # a progress bar had hidden it
    if stop.resume_ref is None:
        _write("Stopped at once.\n")
    elif (os.environ.get("RANK") or "0") == "0":
        _write(
            f"Stopped at once; to go on from the last checkpoint: {visible(command.format(quote(stop.resume_ref)))}\n"
        )


def say_how_a_study_goes_on(command: str) -> None:
    """Print the last line of a process that ends at once in the middle of a study."""
    if sys.stderr is not None and sys.stderr.isatty():
        _write(_SHOW_CURSOR)
    _write(f"Stopped at once; to go on from the last checkpoints: {visible(command)}\n")


def _write(text: str) -> None:
    # In a signal handler: no buffered stream, which may be in the middle of a write.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def let_signals_raise() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt again; see `let_signals_end`."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def let_signals_end() -> None:
    """From here on, Ctrl-C ends this process without a traceback: nothing is left to do, or not yet anything done."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave(status: int) -> NoReturn:
    """End this process, without taking the interpreter apart, which takes a second once torch and MLflow are loaded.

    Threads are waited for, what is registered for the end is done, and streams are flushed, as Python does.
    """
    end_in_time(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # closed, or not there: Python knows what to make of that
        sys.exit(status)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def end_in_time(status: int) -> None:
    """End this process with `status` after `EXIT_SECONDS` if Python cannot: a thread or a process holds it."""

    def end() -> None:
        time.sleep(EXIT_SECONDS)
        os._exit(status)

    threading.Thread(target=end, name="ending", daemon=True).start()
