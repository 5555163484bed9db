"""Calls that end by a deadline on wall time, whatever they wait for.

Time-outs of HTTP clients count from one byte to the next, and a database driver has its own: neither bounds a whole
call. Each call runs in a thread that is abandoned when its time is over; a waiting caller can be interrupted at once.
"""

import concurrent.futures.thread as pools
import contextvars
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")

_POLL_SECONDS = 0.25
"""How often a call is looked at whose deadline moves as it gets on."""

_idle: list["_Worker"] = []
_in_flight: dict[int, tuple[float, float]] = {}
"""Calling thread -> when its present call began, and the seconds that it has beyond the usual ones."""


class _Worker:
    """A thread that makes one call after another."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Callable[[], Any], _Outcome] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="call with a deadline", daemon=True).start()

    def _work(self) -> None:
        while (work := self.calls.get()) is not None:
            call, outcome = work
            try:
                outcome.value = call()
            except BaseException as error:  # noqa: BLE001 - it is raised again by the caller
                outcome.error = error
            outcome.done.release()
            del work, call, outcome  # nothing is kept alive while the thread is idle


class _Outcome:
    value: Any = None
    error: BaseException | None = None

    def __init__(self) -> None:
        self.done = threading.Lock()
        self.done.acquire()


def within(
    seconds: float, call: Callable[[], _T], *, extra: float = 0.0, gained: Callable[[], float] | None = None
) -> _T:
    """Make a call, and return what it returns.

    Args:
        seconds: how long it may take.
        extra: seconds that it may take beyond that, such as those for the transfer of a large file.
        gained: returns further seconds for what has been transferred so far.

    Raises:
        TimeoutError: it did not end in time; its thread is abandoned, and whatever it returns is lost.
    """
    worker, outcome, caller = _idle.pop() if _idle else _Worker(), _Outcome(), threading.get_ident()
    context = contextvars.copy_context()
    began = time.monotonic()
    outer = _in_flight.get(caller)
    _in_flight[caller] = (began, extra)
    in_time = False
    try:
        worker.calls.put((lambda: context.run(call), outcome))
        while not in_time:
            left = began + seconds + extra + (gained() if gained is not None else 0.0) - time.monotonic()
            if left <= 0 and not (in_time := outcome.done.acquire(blocking=False)):
                raise TimeoutError(f"no complete answer within {time.monotonic() - began:.0f} s")
            if not in_time:
                in_time = outcome.done.acquire(timeout=min(left, _POLL_SECONDS) if gained is not None else left)
    finally:
        if outer is None:
            _in_flight.pop(caller, None)
        else:
            _in_flight[caller] = outer
        if in_time:
            _idle.append(worker)
        else:
            worker.calls.put(None)
            _forget_pools()
    if outcome.error is not None:
        try:
            raise outcome.error
        finally:
            del outcome  # the error's traceback refers to this frame
    return outcome.value  # type: ignore[no-any-return]


def _forget_pools() -> None:
    """Let the interpreter end without waiting for pools that an abandoned call has started.

    Their threads are daemons like the one that started them, but `concurrent.futures` joins even those.
    """
    queues: Any = getattr(pools, "_threads_queues", {})
    for thread in list(queues):
        if thread.daemon:
            queues.pop(thread, None)


def call_in_flight(thread: int | None) -> tuple[float, float] | None:
    """Return when the present call of a thread began, and its extra seconds; None if it makes none."""
    return _in_flight.get(thread) if thread is not None else None


def _in_child() -> None:
    _idle.clear()  # the threads are the parent's
    _in_flight.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
