"""One process's work on a run: a thread fills the journal, another one empties it, and the run is ended."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.delivery import Deliverer, Delivery
from shufflenet_mlflow.tracking.journal import Journal, is_created
from shufflenet_mlflow.tracking.messages import Finish, now_ms
from shufflenet_mlflow.tracking.recorder import Recorder
from shufflenet_mlflow.tracking.run import Status, status_after
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.uris import stored_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


class TrackingSession:
    """Delivers messages to a run. As a context manager it ends the run, and waits until everything has arrived.

    FINISHED at the end of the block, or `status`; FAILED after an exception, KILLED after an interruption.

    Args:
        journal: closed at the end.
        run: the run's ID, or its provisional ID.
        kinds: the messages that may be in the journal, by kind.
        is_new: it was created just now, and has no points.
        stop: a signal ends the wait for MLflow.
    """

    def __init__(
        self,
        client: "MlflowClient",
        journal: Journal,
        run: str,
        kinds: Mapping[str, type[Any]],
        *,
        is_new: bool,
        reporter: Reporter,
        stop: StopFlag,
    ) -> None:
        self._client = client
        self.journal, self.run = journal, run
        self.status: Status = "FINISHED"
        self.iters = 0
        """Iterations that the run has completed."""
        self._reporter, self._stop = reporter, stop
        journal.set_owner(run, stored_uri(client.tracking_uri))
        deliverer = Deliverer(client, journal, kinds, new_runs=[run] if is_new else [])
        self.delivery = Delivery(deliverer, reporter)
        self.recorder = Recorder(journal, run, self.delivery.wake, deliverer.just_written)
        if journal.pending:
            reporter.note(f"{journal.pending} entries of an earlier run are waiting for MLflow in {journal.path}")
            self.delivery.wake()

    @property
    def run_id(self) -> str | None:
        """The run's ID; None until MLflow has created it."""
        run_id = self.recorder.run_id
        return run_id if is_created(run_id) else None

    def record(self, *messages: Message) -> None:
        """Put messages into the journal, in order with everything else."""
        for message in messages:
            self.recorder.record(message)

    def __enter__(self) -> "TrackingSession":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        status = self.status if kind is None else status_after(kind)
        try:
            self.record(Finish(status, now_ms(), self.iters))
            self.recorder.close()
            if not self.delivery.wait(self._stop):
                self._mark(status)
            self._say_what_is_left(self.journal.directory)
        finally:
            self.delivery.close()
            self.journal.close()

    def _mark(self, status: Status) -> None:
        """Set the run's status ahead of what is still pending, so that it does not look as if it were running."""
        if self.run_id is None or self.delivery.reason:
            return  # MLflow does not answer
        try:
            with mlflow_errors(f"end run {self.run_id}"):
                self._client.set_terminated(self.run_id, status, now_ms())
        except TrackingError as error:
            logger.warning("%s", error)

    def _say_what_is_left(self, directory: Path) -> None:
        if pending := self.journal.pending:
            self._reporter.warn(
                f"{pending} entries have not reached MLflow and are kept in {self.journal.path}"
                + (f" ({self.delivery.reason})" if self.delivery.reason else "")
                + f"; `shufflenet sync {directory}`, or the next run in that folder, delivers them"
            )
        if self.journal.failure:
            self._reporter.warn(self.journal.failure)
