"""Deliver the journal to MLflow, in order, in its own thread: training never waits for the network.

What cannot be sent stays in the journal and is tried again after a pause of one to fifteen seconds, by the next
process if this one ends first.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.errors import RefusedError, TrackingError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.journal import Entry, Journal, is_created
from shufflenet_mlflow.tracking.messages import Create, MetricPoints, from_body, send_points
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.run import make_run
from shufflenet_mlflow.tracking.target import JustWritten, Message, RunTarget

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0
"""Seconds between attempts, doubled from the first to the second number."""

GIVE_UP_SECONDS = 20.0
"""Seconds to wait at the end of a run for a server that does not answer."""

BACKLOG_SECONDS = 5.0
"""Entries older than this many seconds are reported as overdue."""

REFUSED_NAME = "spool.refused.jsonl"
"""File beside the journal with the entries that MLflow has refused for good."""

_BATCH = 500

NICENESS = 10
"""Priority of the delivery thread: the training loop goes first."""


class Deliverer:
    """Sends journal entries to their runs.

    Args:
        kinds: the messages that may be in the journal, by kind.
        new_runs: IDs of runs that were just created and have no points.
    """

    def __init__(
        self, client: "MlflowClient", journal: Journal, kinds: Mapping[str, type[Any]], *, new_runs: Sequence[str] = ()
    ) -> None:
        self.client = client
        self._kinds = kinds
        self.journal = journal
        self.just_written: JustWritten = {}
        """Files that this process wrote itself; see `JustWritten`."""
        self._targets: dict[str, RunTarget] = {}
        for run_id in new_runs:
            self._add_target(run_id, is_new=True)

    def _add_target(self, run_id: str, *, is_new: bool) -> None:
        target = RunTarget(self.client, run_id, self.journal.directory, is_new=is_new)
        target.just_written = self.just_written
        self._targets[run_id] = target

    def send_some(self) -> int:
        """Send the oldest entries.

        Returns:
            How many arrived, or were set aside; 0 if none is pending.

        Raises:
            TrackingError: the first of them did not arrive; it is still pending.
        """
        entries = self.journal.oldest(_BATCH)
        if not entries:
            return 0
        points = _leading_points(entries)
        if len(points) > 1:
            try:
                send_points(self._target(entries[0].run), points)
            except RefusedError:
                pass  # one of them was refused: they are sent one by one
            else:
                self.journal.delivered(entries[len(points) - 1].seq)
                return len(points)
        entry = entries[0]
        began = time.monotonic()
        try:
            self._send(entry, from_body(self._kinds, entry.kind, entry.body))
            logger.debug("sent to MLflow: %s, %.2f s", entry.kind, time.monotonic() - began)
        except RefusedError as error:
            self._set_aside(entry, str(error))
        self.journal.delivered(entry.seq)
        return 1

    def _send(self, entry: Entry, message: Message) -> None:
        if isinstance(message, Create):
            if not is_created(self.journal.run_id_of(entry.run)):
                run_id, is_new = make_run(self.client, message, journal_id=entry.run)
                self.journal.bind(entry.run, run_id)
                self._add_target(run_id, is_new=is_new)
            return
        message.send(self._target(entry.run))

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
        try:
            with open(self.journal.directory / REFUSED_NAME, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrackingError(
                f"{reason}, and it cannot be set aside: {error.strerror}", code="refused-entry-not-kept"
            ) from error
        logger.warning("%s; set aside in %s", reason, self.journal.directory / REFUSED_NAME)


def _leading_points(entries: Sequence[Entry]) -> list[MetricPoints]:
    """Return the metric points at the head of the journal that go to the same run."""
    points = []
    for entry in entries:
        if entry.kind != MetricPoints.kind or entry.run != entries[0].run:
            break
        points.append(MetricPoints(**entry.body))
    return points


class Delivery:
    """A thread that sends journal entries as soon as they are there.

    Args:
        reporter: gets a warning when sending fails, a note when it works again, and the number of overdue entries.
    """

    def __init__(self, deliverer: Deliverer, reporter: Reporter) -> None:
        self._deliverer, self._reporter = deliverer, reporter
        self.journal = deliverer.journal
        self._changed = threading.Condition()
        self._woken = self._closing = False
        self._failing_since: float | None = None
        self.reason = ""
        """Why sending fails at the moment; empty while it works."""
        self._behind_since: float | None = None
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
                if self._closing:
                    return
                self._woken = False
            pause = FIRST_PAUSE
            while not self._send_all():
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, timeout=pause):
                        return
                pause = min(2 * pause, LONGEST_PAUSE)

    def _send_all(self) -> bool:
        """Send everything; return whether nothing is left."""
        try:
            while self._deliverer.send_some():
                self._works_again()
                self._reporter.waiting(self.backlog)
                if self._closing:
                    return True
        except TrackingError as error:
            self._fails(str(error))
            return False
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread unheard
            self._fails(f"{type(error).__name__}: {redact(str(error))}")
            return False
        with self._changed:
            if self.journal.pending == 0:
                self._behind_since = None
                self._reporter.waiting(0)
            self._changed.notify_all()
        return True

    def _fails(self, reason: str) -> None:
        with self._changed:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                self._reporter.warn(f"{reason}; training goes on, and it is sent again later")
            self.reason = reason
            self._reporter.waiting(self.backlog)
            self._changed.notify_all()

    def _works_again(self) -> None:
        with self._changed:
            if self._failing_since is not None:
                self._reporter.note("MLflow answers again; pending entries are being sent")
            self._failing_since, self.reason = None, ""
            self._changed.notify_all()

    def wait(self, stop: StopFlag) -> bool:
        """Wait until everything has arrived; for a server that does not answer, `GIVE_UP_SECONDS`.

        Args:
            stop: a signal ends the wait, once its grace period is over.

        Returns:
            Whether everything has arrived.
        """
        self.wake()
        began = time.monotonic()
        before = self.journal.pending
        if before == 0:
            return True
        with self._reporter.phase("sending to MLflow", before) as phase:
            while (pending := self.journal.pending) > 0:
                for _ in range(before - pending):
                    phase.advance()
                before = pending
                since = self._failing_since
                if since is not None and time.monotonic() - max(since, began) > GIVE_UP_SECONDS:
                    return False
                if stop.is_out_of_time:
                    return False
                with self._changed:
                    self._changed.wait(0.2)
            for _ in range(before):
                phase.advance()
        return True

    def close(self) -> None:
        """End the thread; what has not arrived stays in the journal."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)  # a hanging request ends with the process


def deliver_now(client: "MlflowClient", journal: Journal, kinds: Mapping[str, type[Any]]) -> None:
    """Send everything, without a thread.

    Raises:
        TrackingError: an entry did not arrive; it and those behind it are still pending.
    """
    deliverer = Deliverer(client, journal, kinds)
    while deliverer.send_some():
        pass


def yield_to_training() -> None:
    """Give the calling thread only the processor time that other threads leave.

    Only Linux has priorities per thread; elsewhere this does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
