"""A thread that fills the journal, in order with other work, so that the training loop does not wait."""

from collections.abc import Callable

from shufflenet_mlflow.runtime.jobs import Jobs
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.target import JustWritten, Message


class Recorder(Jobs):
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
        super().__init__("recorder")

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
