"""The ends of trials' runs, each in a thread: the next trial trains while the last checkpoint goes to MLflow."""

import threading
from collections import deque
from collections.abc import Callable

MOST_AT_A_TIME = 4
"""Runs that may be ending while another one trains."""


class _Ending(threading.Thread):
    def __init__(self, trial: int, work: Callable[[], object]) -> None:
        super().__init__(name="ending a trial", daemon=True)
        self.trial, self._work = trial, work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised where the thread is joined
            self.error = error


class Endings:
    """Work that ends runs, oldest first."""

    def __init__(self) -> None:
        self._threads: deque[_Ending] = deque()

    def add(self, trial: int, work: Callable[[], object]) -> None:
        """Begin work on a trial's run in a thread; wait for the oldest if there are too many.

        Raises:
            BaseException: what earlier work has raised.
        """
        self._threads.append(_Ending(trial, work))
        while len(self._threads) > MOST_AT_A_TIME or (self._threads and not self._threads[0].is_alive()):
            self.join_one()

    def join_one(self) -> bool:
        """Wait for the oldest; return False if there is none.

        Raises:
            BaseException: what it has raised.
        """
        if not self._threads:
            return False
        thread = self._threads.popleft()
        thread.join()
        if thread.error is not None:
            raise thread.error
        return True

    def join(self, trial: int) -> None:
        """Wait until nothing is done for a trial any more; raises what `join_one` does."""
        while any(thread.trial == trial for thread in self._threads):
            self.join_one()

    def join_all(self) -> None:
        """Wait for all; raises what `join_one` does."""
        while self.join_one():
            pass

    def settle(self) -> None:
        """Wait for all; what they raise is of no interest any more, since something else has been raised."""
        while self._threads:
            self._threads.popleft().join()
