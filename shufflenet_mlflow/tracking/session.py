"""One process's work on a run: a thread fills the journal, another one empties it, and the run is ended."""

import logging
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.errors import LostLeaseError, TrackingError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.delivery import Deliverer, Delivery, tell_what_is_left
from shufflenet_mlflow.tracking.exchanges import impatient
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import FolderLease, is_created
from shufflenet_mlflow.tracking.lease import Lease, Renewal
from shufflenet_mlflow.tracking.messages import Finish, now_ms
from shufflenet_mlflow.tracking.recorder import Recorder
from shufflenet_mlflow.tracking.refused import read_refused
from shufflenet_mlflow.tracking.run import Status, status_after
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.trust import remember_store
from shufflenet_mlflow.tracking.uris import stored_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MARK_SECONDS = 3.0
"""Seconds that a run's status may take ahead of the entries before it: a process that was told to end has few."""


class TrackingSession:
    """Delivers messages to a run. As a context manager it ends the run, and waits until everything has arrived.

    FINISHED at the end of the block, or `status`; FAILED after an exception, KILLED after an interruption.

    Args:
        journal: closed at the end.
        run: the run's ID, or its provisional ID.
        kinds: the messages that may be in the journal, by kind.
        is_new: it was created just now, and has no points.
        stop: a signal ends the wait for MLflow.
        lease: the right to write to the run, taken already unless the store did not answer; None where no other
            process can know the run.
        config: digest of the run's options.
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
        lease: Lease | None = None,
        config: str | None = None,
        ended: int | None = None,
    ) -> None:
        self._client = client
        self.ended = ended
        """When the run had ended before, if nothing was left to do: then it keeps its end."""
        self.journal, self.run = journal, run
        self.status: Status = "FINISHED"
        self.iters = 0
        """Iterations that the run has completed."""
        self._reporter, self._stop = reporter, stop
        earlier = journal.lease if journal.run == run else None
        journal.set_owner(run, stored_uri(client.tracking_uri))
        remember_store(client.tracking_uri)
        self._sealed = False
        self._lease = lease
        self._renewal: Renewal | None = None
        if lease is not None:
            lease.directory = journal.directory
            if lease.after is None and earlier is not None:
                lease.after = earlier.token if earlier.taken else earlier.after
            journal.note_lease(FolderLease(lease.token, config, lease.iters, lease.is_taken, lease.after))
            lease.own_tokens = journal.tokens
        deliverer = Deliverer(client, journal, kinds, new_runs=[run] if is_new else [], lease=lease)
        self.delivery = Delivery(deliverer, reporter, self._stop_training)
        self.recorder = Recorder(journal, run, self.delivery.wake, deliverer.just_written)
        if journal.pending:
            reporter.note(
                f"{counted(journal.pending, 'entry', 'entries')} of an earlier run waiting for MLflow in {journal.path}"
            )
            self.delivery.wake()

    @property
    def run_id(self) -> str | None:
        """The run's ID; None until MLflow has created it."""
        run_id = self.recorder.run_id
        return run_id if is_created(run_id) else None

    @property
    def refused(self) -> int:
        """Number of entries that MLflow has refused, which are kept beside the journal."""
        return len(read_refused(self.journal.directory))

    def record(self, *messages: Message) -> None:
        """Put messages into the journal, in order with everything else."""
        for message in messages:
            self.recorder.record(message)

    def __enter__(self) -> "TrackingSession":
        if self._lease is not None:
            self._renewal = Renewal(self._client, self._lease, lambda: self.run_id, self.delivery.lose)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        status = self.status if kind is None else status_after(kind)
        if self.ended is not None:
            status = "FINISHED"
        try:
            self._record_end(status)
            if self.delivery.wait(self._stop):
                self._release()
            elif self.lost is None:
                self._mark(status)
            if self.lost is None:
                tell_what_is_left(self.delivery, self._reporter)
        finally:
            if self._lease is not None and self._renewal is not None:
                self._renewal.close()
                self._lease.forget()
            self.delivery.close()
            self.journal.close()

    def seal(self) -> bool:
        """Put the run's end into the journal, with `status`; nothing can be recorded after it.

        Returns:
            Whether all of the run is safe on the disk: whatever happens now, it can be delivered from there.
        """
        self._record_end("FINISHED" if self.ended is not None else self.status)
        self.journal.sync()
        return self.lost is None and self.recorder.failure is None and self.journal.failure is None

    def _record_end(self, status: Status) -> None:
        if self._sealed:
            return
        self._sealed = True
        if self.lost is None:
            self.record(Finish(status, self.ended or now_ms(), self.iters))
        self.recorder.close()

    @property
    def lost(self) -> LostLeaseError | None:
        """Another process has taken the run; nothing more is sent to it."""
        return self.delivery.lost

    def _stop_training(self, error: LostLeaseError) -> None:
        """Have the loop save a checkpoint and stop, as a signal would."""
        self._reporter.warn(f"{str(error).partition(';')[0]}: stopping")
        self._stop.set(signal.SIGTERM)

    def _release(self) -> None:
        if self.run_id is None or self._lease is None:
            return
        try:
            self._lease.release(self._client, self.run_id)
        except TrackingError as error:
            logger.warning("%s", error)

    def _mark(self, status: Status) -> None:
        """Set the run's status ahead of what is still pending, so that it does not look as if it were running."""
        if self.run_id is None or self.delivery.reason:
            return  # MLflow does not answer
        try:
            with impatient(MARK_SECONDS), mlflow_errors(f"end run {self.run_id}"):
                self._client.set_terminated(self.run_id, status, self.ended or now_ms())
        except TrackingError as error:
            logger.warning("%s", error)
