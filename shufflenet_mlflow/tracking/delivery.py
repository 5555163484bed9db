"""Deliver the journal to MLflow, in order, in its own thread: training never waits for the network.

What cannot be sent stays in the journal and is tried again after a pause of one to fifteen seconds, by the next
process if this one ends first.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.errors import DeletedError, LostLeaseError, RefusedError, TrackingError
from shufflenet_mlflow.runtime.deadlines import call_in_flight
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import Entry, is_created
from shufflenet_mlflow.tracking.lease import Lease, lost_lease, writer_in
from shufflenet_mlflow.tracking.lifecycle import explained
from shufflenet_mlflow.tracking.messages import Create, Finish, MetricPoints, from_body
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.refused import REFUSED_NAME, keep_refused, read_refused
from shufflenet_mlflow.tracking.run import end_surplus_runs, make_run
from shufflenet_mlflow.tracking.target import Joinable, JustWritten, Message, RunTarget

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0
"""Seconds between attempts, doubled from the first to the second number."""

GIVE_UP_SECONDS = 20.0
"""Seconds to wait at the end of a run for a server that does not answer."""

BACKLOG_SECONDS = 5.0
"""Entries older than this many seconds are reported as overdue."""

_BATCH = 500

NICENESS = 10
"""Priority of the delivery thread: the training loop goes first."""


class Deliverer:
    """Sends journal entries to their runs.

    Args:
        kinds: the messages that may be in the journal, by kind.
        new_runs: IDs of runs that were just created and have no points.
        lease: the right to write to the journal's run; without one, what was written before another process took
            the run is not sent.
    """

    def __init__(
        self,
        client: "MlflowClient",
        journal: Journal,
        kinds: Mapping[str, type[Any]],
        *,
        new_runs: Sequence[str] = (),
        lease: Lease | None = None,
    ) -> None:
        self.client = client
        self._lease = lease
        self._kinds = kinds
        self.journal = journal
        self.just_written: JustWritten = {}
        """Files that this process wrote itself; see `JustWritten`."""
        self.refusals: list[str] = []
        """Why entries were set aside."""
        self._targets: dict[str, RunTarget] = {}
        for run_id in new_runs:
            self._add_target(run_id, is_new=True)

    def _add_target(self, run_id: str, *, is_new: bool) -> None:
        target = RunTarget(self.client, run_id, self.journal.directory, is_new=is_new)
        target.just_written = self.just_written
        if self._lease is not None and run_id == self._own_run_id:
            target.guard(partial(self._lease.require, self.client, run_id, fresh=False))
            target.require_writer = partial(self._lease.check, self.client, run_id)
        self._targets[run_id] = target

    def send_some(self) -> int:
        """Send the oldest entries.

        Returns:
            How many arrived, or were set aside; 0 if none is pending.

        Raises:
            DeletedError: the run, or its experiment, was deleted; what was meant for it stays pending.
            TrackingError: the first of them did not arrive; it is still pending.
            LostLeaseError: another process has taken the run; what was meant for it stays pending.
        """
        entries = self.journal.oldest(_BATCH)
        if not entries:
            return 0
        try:
            return self._send_first_of(entries)
        except TrackingError as error:
            raise explained(self.client, self.journal.run_id_of(entries[0].run), error) from error

    def _send_first_of(self, entries: Sequence[Entry]) -> int:
        """Send the first entry, or all of its kind at the head; return how many arrived, or were set aside."""
        stale = self._require_writer(entries[0])
        if stale:
            self._set_aside(entries[0], stale)
            self.journal.delivered(entries[0].seq)
            return 1
        messages = self._joinable_at_head(entries)
        if len(messages) > 1:
            try:
                messages[0].send_all(self._target(entries[0].run), messages)
            except RefusedError:
                pass  # one of them was refused: they are sent one by one
            else:
                self.journal.delivered(entries[len(messages) - 1].seq)
                return len(messages)
        entry = entries[0]
        began = time.monotonic()
        try:
            self._send(entry, from_body(self._kinds, entry.kind, entry.body))
            logger.debug("sent to MLflow: %s, %.2f s", entry.kind, time.monotonic() - began)
        except RefusedError as error:
            if entry.kind == Create.kind and error.mlflow_code is not None:  # all is lost without the run
                raise TrackingError(str(error), error.mlflow_code, code="run-not-created") from error
            self._set_aside(entry, str(error))
        self.journal.delivered(entry.seq)
        return 1

    def _joinable_at_head(self, entries: Sequence[Entry]) -> list[Joinable]:
        """Return the messages at the head of the journal that can go to their run in one request."""
        messages: list[Joinable] = []
        for entry in entries:
            if (entry.kind, entry.run) != (entries[0].kind, entries[0].run):
                break
            try:
                message = from_body(self._kinds, entry.kind, entry.body)
            except RefusedError:
                break
            if not isinstance(message, Joinable):
                break
            messages.append(message)
        return messages

    @property
    def _own_run_id(self) -> str | None:
        """ID of the journal's run, or its provisional ID."""
        return None if self.journal.run is None else self.journal.run_id_of(self.journal.run)

    def _require_writer(self, entry: Entry) -> str | None:
        """Check that the run has not been taken over by another process since the entry was written.

        Returns:
            Why the entry must be set aside; None if it can be sent.
        """
        run_id = self.journal.run_id_of(entry.run)
        if not is_created(run_id) or getattr(self._kinds.get(entry.kind), "any_writer", False):
            return None
        is_own, is_metrics = run_id == self._own_run_id, entry.kind == MetricPoints.kind
        if is_own and self._lease is not None:
            self._lease.require(self.client, run_id, fresh=not is_metrics)
            self.journal.note_taken()
            return None
        writer = writer_in(self._target(entry.run).read().data.tags)
        if writer is None or writer.token in self.journal.tokens:
            return None
        if is_own and self.journal.tokens:
            raise lost_lease(run_id, writer, self.journal.directory)
        if not self.journal.tokens and writer.is_another:
            return f"run {run_id} is being trained by {writer}, and nothing else may write to it meanwhile"
        # Without a token, the entry is an earlier version's, or a script's, whose checkpoints and points are welcome.
        is_welcome = not self.journal.tokens and (is_metrics or entry.kind == Checkpoint.kind)
        return None if is_welcome else f"run {run_id} has been taken over by {writer} since"

    def _create(self, message: Create, run: str) -> tuple[str, bool]:
        """Create the run, as its writer if it is the journal's own."""
        lease = self._lease if run == self.journal.run else None
        if lease is not None:
            message = replace(message, tags={**message.tags, **lease.claim(None)})
        # The process that started the run may have sent the request already.
        run_id, is_new = make_run(self.client, message, mark=run, is_first=False)
        if lease is not None and not is_new:
            lease.unclaim()  # an earlier attempt has created it, and is still its writer
        return run_id, is_new

    def _send(self, entry: Entry, message: Message) -> None:
        if isinstance(message, Create):
            if not is_created(self.journal.run_id_of(entry.run)):
                run_id, is_new = self._create(message, entry.run)
                self.journal.bind(entry.run, run_id)
                self._add_target(run_id, is_new=is_new)
            return
        target = self._target(entry.run)
        message.send(target)
        if isinstance(message, Finish):
            self._end_surplus_runs(target.run_id)

    def _end_surplus_runs(self, run_id: str) -> None:
        """Delete what late requests to create the run have left; not worth waiting for."""
        for mark in [mark for mark, bound in self.journal.bound.items() if bound == run_id]:
            try:
                end_surplus_runs(self.client, run_id, mark)
            except TrackingError as error:
                logger.warning("%s", error)

    def _target(self, run: str) -> RunTarget:
        run_id = self.journal.run_id_of(run)
        if not is_created(run_id):
            raise RefusedError(
                "the entry that creates the run is missing from the journal", code="journal-entry-without-run"
            )
        if run_id not in self._targets:
            self._add_target(run_id, is_new=False)
        return self._targets[run_id]

    def _set_aside(self, entry: Entry, reason: str) -> None:
        line = {"run": self.journal.run_id_of(entry.run), "kind": entry.kind, "body": entry.body, "reason": reason}
        keep_refused(self.journal.directory, line)
        self.refusals.append(reason)
        logger.warning("%s; set aside in %s", reason, self.journal.directory / REFUSED_NAME)


class Delivery:
    """A thread that sends journal entries as soon as they are there.

    Args:
        reporter: gets a warning when sending fails, a note when it works again, and the number of overdue entries.
        on_loss: called once, when another process has taken the run.
    """

    def __init__(
        self, deliverer: Deliverer, reporter: Reporter, on_loss: Callable[[LostLeaseError], None] = lambda _error: None
    ) -> None:
        self._deliverer, self._reporter = deliverer, reporter
        self.journal = deliverer.journal
        self._changed = threading.Condition()
        self._woken = self._closing = self._is_urgent = False
        self._failing_since: float | None = None
        self.reason = ""
        """Why sending fails at the moment; empty while it works."""
        self.error: TrackingError | None = None
        """The error behind `reason`, if it is MLflow's."""
        self._tried = 0.0
        self._behind_since: float | None = None
        self.lost: LostLeaseError | None = None
        """Another process has taken the run; nothing more is sent."""
        self._on_loss = on_loss
        self._thread = threading.Thread(target=self._work, name="delivery to MLflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that there is something to send."""
        with self._changed:
            self._woken = True
            if self._behind_since is None:
                self._behind_since = time.monotonic()
            self._changed.notify_all()

    @property
    def backlog(self) -> int:
        """Number of pending entries, if some are overdue."""
        since = self._behind_since
        late = since is not None and time.monotonic() - since > BACKLOG_SECONDS
        return self.journal.pending if late or self.reason else 0

    def _work(self) -> None:
        yield_to_training()  # unlike the recorder, which the next save waits for
        while True:
            with self._changed:
                while not self._woken and not self._closing:
                    self._changed.wait()
                if self._closing or self.lost is not None:
                    return
                self._woken = False
            pause = FIRST_PAUSE
            while not self._send_all():
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._is_urgent, timeout=pause)
                    if self._closing:
                        return
                    self._is_urgent = False
                pause = min(2 * pause, LONGEST_PAUSE)

    def _send_all(self) -> bool:
        """Send everything; return whether nothing is left."""
        began = time.monotonic()
        try:
            while self.lost is None and self._deliverer.send_some():
                began = time.monotonic()
                self._works_again()
                self._reporter.waiting(self.backlog)
                if self._closing:
                    return True
        except LostLeaseError as error:
            self.lose(error)
        except TrackingError as error:
            self._fails(str(error), began, error)
            return False
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread unheard
            self._fails(f"{type(error).__name__}: {redact(str(error))}", began)
            return False
        with self._changed:
            if self.journal.pending == 0:
                self._behind_since = None
                self._reporter.waiting(0)
            self._changed.notify_all()
        return True

    def lose(self, error: LostLeaseError) -> None:
        """Send nothing more: another process has taken the run."""
        with self._changed:
            is_first, self.lost = self.lost is None, error
            self._changed.notify_all()
        if is_first:
            self._on_loss(error)

    def _fails(self, reason: str, began: float, error: TrackingError | None = None) -> None:
        with self._changed:
            self.error, self._tried = error, began
            if self._failing_since is None:
                self._failing_since = began
                self._reporter.warn(f"{reason}; training goes on, and it is sent again later")
            self.reason = reason
            self._reporter.waiting(self.backlog)
            self._changed.notify_all()

    def _works_again(self) -> None:
        with self._changed:
            if self._failing_since is not None:
                self._reporter.note("MLflow answers again; pending entries are being sent")
            self._failing_since, self.reason, self.error = None, "", None
            self._changed.notify_all()

    @property
    def thread_id(self) -> int | None:
        """Identifier of the thread."""
        return self._thread.ident

    def wait_briefly(self, seconds: float) -> bool:
        """Wait until everything has arrived or sending has failed; return whether either happened in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.journal.pending == 0 or bool(self.reason), timeout=seconds)

    def wait(self, stop: StopFlag, *, give_up: float | None = None) -> bool:
        """Wait until everything has arrived.

        A run that was deleted is not waited for, once that is known to be still so.

        Args:
            stop: a signal ends the wait, once its grace period is over.
            give_up: seconds to wait for a server that does not answer; `GIVE_UP_SECONDS` if not given.

        Returns:
            Whether everything has arrived.
        """
        give_up = GIVE_UP_SECONDS if give_up is None else give_up
        self.wake()
        began = time.monotonic()
        with self._changed:
            self._is_urgent = isinstance(self.error, DeletedError)
            self._changed.notify_all()
        before = self.journal.pending
        if before == 0:
            return True
        with self._reporter.phase("sending to MLflow", before) as phase:
            while (pending := self.journal.pending) > 0:
                for _ in range(before - pending):
                    phase.advance()
                before = pending
                if self.lost is not None or self._is_hopeless(began, give_up):
                    return False
                if stop.is_out_of_time:
                    return False
                with self._changed:
                    self._changed.wait(0.2)
            for _ in range(before):
                phase.advance()
        return True

    def _is_hopeless(self, began: float, give_up: float) -> bool:
        """Whether sending has failed, or one exchange has hung, for `give_up` seconds since `began`."""
        if isinstance(self.error, DeletedError) and self._tried >= began:
            return True
        now, since = time.monotonic(), self._failing_since
        if since is not None and now - max(since, began) > give_up:
            return True
        call = call_in_flight(self._thread.ident)
        if call is not None and now - max(call[0], began) > give_up + call[1]:
            self.reason = f"no complete answer within {now - call[0]:.0f} s"
            return True
        return False

    def close(self) -> None:
        """End the thread; what has not arrived stays in the journal."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)  # a hanging request ends with the process


def tell_what_is_left(delivery: Delivery, reporter: Reporter) -> None:
    """Warn of what has not reached MLflow, and of what it has refused, with the way out."""
    journal, error = delivery.journal, delivery.error
    sync = f"shufflenet sync {quote(str(journal.directory))}"
    if pending := journal.pending:
        kept = (
            counted(pending, "entry has not reached MLflow and is", "entries have not reached MLflow and are")
            + f" kept in {journal.path}"
        )
        if isinstance(error, DeletedError):
            what = str(error).partition(";")[0]
            reporter.warn(f"{kept}: {what}; `{error.command}`, and then `{sync}`, delivers them")
        else:
            reason = f" ({delivery.reason})" if delivery.reason else ""
            reporter.warn(f"{kept}{reason}; `{sync}`, or the next run in that folder, delivers them")
    if refused := len(read_refused(journal.directory)):
        reporter.warn(
            f"{refused} entries were refused by MLflow and are kept in {journal.directory / REFUSED_NAME}; "
            f"`{sync} --refused` sends them again"
        )
    if journal.failure:
        reporter.warn(journal.failure)


def yield_to_training() -> None:
    """Give the calling thread only the processor time that other threads leave.

    Only Linux has priorities per thread; elsewhere this does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
