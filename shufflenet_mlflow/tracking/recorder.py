"""A thread that does what the training loop hands to it, in order, so that the loop does not wait."""

import logging
import queue
import threading
from collections.abc import Callable

from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.target import JustWritten, Message

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Recorder:
    """Puts messages to one run into the journal, and does other work between them, all in order.

    Args:
        run: the run's ID, or its provisional ID.
        wake: called when something new is in the journal.
        just_written: files that this process wrote itself; see `JustWritten`.
    """

    def __init__(
        self, journal: Journal, run: str, wake: Callable[[], None], just_written: JustWritten | None = None
    ) -> None:
        self.journal, self.run, self._wake = journal, run, wake
        self.just_written = just_written if just_written is not None else {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        """The first error that a job raised."""
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The run's ID, or its provisional ID."""
        return self.journal.run_id_of(self.run)

    def record(self, message: Message) -> None:
        """Put a message into the journal, behind everything given before."""
        self.do(lambda: self.append(message))

    def append(self, message: Message, *, durable: bool = False) -> None:
        """Put a message into the journal at once; for jobs, which run in order already.

        Args:
            durable: safe from a loss of power too, with everything before it.
        """
        self.journal.append(self.run, message.kind, to_body(message))
        if durable:
            self.journal.sync()
        self._wake()

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
