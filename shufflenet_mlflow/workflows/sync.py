"""`shufflenet sync`: deliver what a folder's journal still holds."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import remove_leftovers
from shufflenet_mlflow.errors import JournalError, TrackingError
from shufflenet_mlflow.export import LogModels
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import connect, prepare_environment
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.delivery import Deliverer
from shufflenet_mlflow.tracking.journal import JOURNAL_NAME, Entry, Journal, read_pending
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.store import lost_checkpoints
from shufflenet_mlflow.tracking.uris import uri_of_journal
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS


@dataclass(frozen=True)
class SyncSummary:
    """Entries that were sent, and those that are pending."""

    directory: Path
    run_id: str | None
    """The run of the folder; None if MLflow has not created it yet."""
    tracking_uri: str
    sent: int
    pending: tuple[Entry, ...]

    def kinds(self) -> dict[str, int]:
        """Return the number of pending entries by kind."""
        return dict(Counter(entry.kind for entry in self.pending))

    def uploads(self) -> list[dict[str, Any]]:
        """Return the checkpoints whose upload is pending."""
        return [entry.body["record"] for entry in self.pending if entry.kind == Checkpoint.kind]

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `sync --json`."""
        return {
            "directory": str(self.directory),
            "run_id": self.run_id,
            "tracking_uri": self.tracking_uri,
            "sent": self.sent,
            "pending": len(self.pending),
            "pending_by_kind": self.kinds(),
            "pending_checkpoints": self.uploads(),
        }


def run_sync(
    directory: Path, *, dry_run: bool, tracking_uri: str | None, reporter: Reporter, stop: StopFlag
) -> SyncSummary:
    """Send what the journal of `directory` holds, in order.

    Args:
        dry_run: only report what is pending.
        tracking_uri: by default the store that training used.

    Raises:
        JournalError: there is no such folder, or its journal cannot be read.
        BusyError: a run is being trained there, and delivers its own entries.
        TrackingError: MLflow did not answer; unsent entries are still pending.
        StopRequested: a signal arrived; unsent entries are still pending.
    """
    prepare_environment()
    if not os.path.isdir(directory):  # unlike Path.is_dir, never raises
        raise JournalError(
            f"{str(directory)!r} is not a folder; name the one that --save-dir named, or models/RUN_ID",
            code="sync-not-folder",
        )
    pending = read_pending(directory)
    uri = uri_of_journal(pending.uri, tracking_uri)
    if dry_run or not (directory / JOURNAL_NAME).exists():
        return SyncSummary(directory, pending.run_id, redact(uri or ""), 0, pending.entries)
    journal = Journal(directory)
    try:
        remove_leftovers(directory)
        before = journal.pending
        if journal.run is not None:
            for message in lost_checkpoints(journal):
                journal.append(journal.run, message.kind, to_body(message))
        possibly_lost = journal.pending - before
        sent = max(0, _send(Deliverer(connect(uri), journal, MESSAGE_KINDS), reporter, stop) - possibly_lost)
    finally:
        journal.close()
    pending = read_pending(directory)
    return SyncSummary(directory, pending.run_id, redact(uri or ""), sent, pending.entries)


def _send(deliverer: Deliverer, reporter: Reporter, stop: StopFlag) -> int:
    sent, journal = 0, deliverer.journal
    with reporter.phase("sending to MLflow", journal.pending) as phase:
        while True:
            stop.check()
            try:
                arrived = deliverer.send_some()
            except TrackingError as error:
                raise TrackingError(
                    f"{error}; {journal.pending} entries have not been sent and are kept in {str(journal.path)!r}",
                    error.mlflow_code,
                    code="sync-interrupted",
                ) from error
            if not arrived:
                return sent
            sent += arrived
            for _ in range(arrived):
                phase.advance()


def describe_entries(entries: Sequence[Entry]) -> str:
    """Return text such as `3 checkpoints, 20 steps of metrics`."""
    counts = Counter(_PLURALS.get(entry.kind, entry.kind) for entry in entries)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


_PLURALS = {
    "checkpoint": "checkpoints",
    "metrics": "steps of metrics",
    "params": "sets of parameters",
    "tags": "sets of tags",
    "text": "small files",
    "input": "data sets",
    "note": "descriptions",
    LogModels.kind: "sets of logged models",
    "prune": "rounds of pruning",
    "create": "new runs",
    "reopen": "continued runs",
    "finish": "ends of runs",
}
