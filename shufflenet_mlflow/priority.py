"""Letting the training loop go first, where it never has to wait for the thread in question."""

import contextlib
import os
import sys
import threading

NICENESS = 10


def yield_to_training() -> None:
    """Let the calling thread have only what processor time the others leave it.

    On Linux a thread has a priority of its own. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
