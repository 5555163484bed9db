"""A thread that does what it is given, in order, so that the caller does not wait."""

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Jobs:
    """Work for a thread of its own.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        """The first error that a job raised."""
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Do a job when its turn comes."""
        self._jobs.put(job)

    def drain(self) -> None:
        """Wait until everything given so far is done.

        Raises:
            BaseException: what a job raised.
        """
        done = threading.Event()
        self._jobs.put(done.set)
        while not done.wait(timeout=1.0):  # signals are handled between timeouts
            if not self._thread.is_alive():
                break
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what a job raised, once."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def close(self) -> None:
        """Do what is left, then end the thread."""
        self._jobs.put(None)
        self._thread.join()
        if self.failure is not None:
            logger.warning("%s", self.failure)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised where the work was given
                self.failure = self.failure or error
