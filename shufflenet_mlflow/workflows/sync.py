"""`shufflenet sync`: deliver what a folder's journal still holds."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.folders import remove_leftovers
from shufflenet_mlflow.errors import BusyError, JournalError, TrackingError
from shufflenet_mlflow.export import LogModels
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import connect, prepare_environment
from shufflenet_mlflow.tracking.commit import pending_checkpoints
from shufflenet_mlflow.tracking.courier import let_go
from shufflenet_mlflow.tracking.delivery import Deliverer
from shufflenet_mlflow.tracking.durable_runs import DEFAULT_FOLDER, folders_of_journals, remove_empty
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, Entry, is_created, read_pending
from shufflenet_mlflow.tracking.lease import Lease
from shufflenet_mlflow.tracking.lifecycle import refuse_deleted_run
from shufflenet_mlflow.tracking.logged import LoggedBatch, LoggedFile, LoggedInputs, RunUpdate
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.refused import read_refused, take_refused_again
from shufflenet_mlflow.tracking.store import lost_checkpoints
from shufflenet_mlflow.tracking.trust import remember_store, uri_of_journal
from shufflenet_mlflow.tracking.uris import server_behind
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.searching.request import BEST_FOLDER, FRONT_FOLDER
from shufflenet_mlflow.workflows.tuning.request import TRIAL_FOLDER

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient


@dataclass(frozen=True)
class SyncSummary:
    """Entries that were sent, and those that are pending."""

    directory: Path
    run_id: str | None
    """The run of the folder; None if MLflow has not created it yet."""
    tracking_uri: str
    sent: int
    pending: tuple[Entry, ...]
    refused: int = 0
    """Entries that MLflow has refused, and that only `--refused` sends again."""
    trials: tuple["SyncSummary", ...] = ()
    """The folders below it, of a study's trials or of a search's best candidates."""
    journals: tuple["SyncSummary", ...] = ()
    """The folders of runs, or of a run's processes, below it; see `tracking.durable_runs`."""

    @property
    def all_sent(self) -> int:
        """Entries that were sent, those of the folders below included."""
        return self.sent + sum(below.all_sent for below in (*self.trials, *self.journals))

    @property
    def all_pending(self) -> tuple[Entry, ...]:
        """Pending entries, those of the folders below included."""
        return (*self.pending, *(entry for below in (*self.trials, *self.journals) for entry in below.all_pending))

    def all_refused(self) -> dict[Path, int]:
        """Return the folders with entries that MLflow has refused, and their numbers."""
        own = {self.directory: self.refused} if self.refused else {}
        return {**own, **{folder: n for journal in self.journals for folder, n in journal.all_refused().items()}}

    def kinds(self) -> dict[str, int]:
        """Return the number of pending entries by kind."""
        return dict(Counter(entry.kind for entry in self.pending))

    def uploads(self) -> list[dict[str, Any]]:
        """Return the checkpoints whose upload is pending."""
        return [manifest.to_dict() for manifest in pending_checkpoints(self.pending)]

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `sync --json`."""
        return {
            "directory": str(self.directory),
            "run_id": self.run_id,
            "tracking_uri": self.tracking_uri,
            "sent": self.sent,
            "pending": len(self.pending),
            "pending_by_kind": self.kinds(),
            "refused": self.refused,
            "pending_checkpoints": self.uploads(),
            **({"trials": [trial.to_dict() for trial in self.trials]} if self.trials else {}),
            **({"journals": [journal.to_dict() for journal in self.journals]} if self.journals else {}),
        }


def run_sync_of_all(directory: Path, *, dry_run: bool, reporter: Reporter, **given: Any) -> SyncSummary:
    """Send what the journal of `directory` holds, then those of all runs below it; see `run_sync`.

    A run below that is still being logged to is left out, with a warning.
    """
    summary = run_sync(directory, dry_run=dry_run, reporter=reporter, **given)
    below = (directory.glob(f"{name}*/{JOURNAL_NAME}") for name in (TRIAL_FOLDER, BEST_FOLDER, FRONT_FOLDER))
    trials = sorted(path.parent for paths in below for path in paths)
    journals = []
    for folder in folders_of_journals(directory):
        try:
            synced = run_sync_of_all(folder, dry_run=dry_run, reporter=reporter, **given)
            if synced.all_sent or synced.all_pending or synced.all_refused():
                journals.append(synced)
            if not dry_run:
                remove_empty(folder)
        except BusyError as error:
            reporter.warn(str(error))
    return replace(
        summary,
        trials=tuple(run_sync(folder, dry_run=dry_run, reporter=reporter, **given) for folder in trials),
        journals=tuple(journals),
    )


def run_sync(
    directory: Path,
    *,
    dry_run: bool,
    tracking_uri: str | None,
    reporter: Reporter,
    stop: StopFlag,
    refused: bool = False,
) -> SyncSummary:
    """Send what the journal of `directory` holds, in order.

    Args:
        dry_run: only report what is pending.
        refused: send what MLflow has refused before, too.
        tracking_uri: by default the store that training used.

    Raises:
        JournalError: there is no such folder, or its journal cannot be read.
        BusyError: a run is being trained there, and delivers its own entries.
        DeletedError: the run, or its experiment, was deleted.
        TrackingError: the user has never named the journal's store, or MLflow did not answer; unsent entries are
            still pending.
        StopRequested: a signal arrived; unsent entries are still pending.
    """
    prepare_environment()
    if not os.path.isdir(directory):  # unlike Path.is_dir, never raises
        if directory.name == DEFAULT_FOLDER:  # it is there while something waits in it
            return SyncSummary(directory, None, "", 0, ())
        raise JournalError(
            f"{str(directory)!r} is not a folder; name the one that --save-dir named, models/RUN_ID, or mlflow-journal",
            code="sync-not-folder",
        )
    pending = read_pending(directory)
    set_aside = len(read_refused(directory))
    if dry_run or not ((directory / JOURNAL_NAME).exists() or (refused and set_aside)):
        named = tracking_uri or pending.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        return SyncSummary(directory, pending.run_id, redact(server_behind(named)), 0, pending.entries, set_aside)
    uri = uri_of_journal(pending.uri, tracking_uri)
    if tracking_uri is not None:
        remember_store(tracking_uri)
    let_go(directory)  # if a script of this process delivers from there
    journal = Journal(directory)
    try:
        client = connect(uri)
        if journal.run is not None and is_created(run_id := journal.run_id_of(journal.run)):
            refuse_deleted_run(client, run_id)
        remove_leftovers(directory)
        if refused:
            take_refused_again(journal)
        before = journal.pending
        if journal.run is not None:
            for message in lost_checkpoints(journal):
                journal.append(journal.run, message.kind, to_body(message))
        possibly_lost = journal.pending - before
        with _lease_of_folder(client, journal) as lease:
            sent = _send(Deliverer(client, journal, MESSAGE_KINDS, lease=lease), reporter, stop)
        sent = max(0, sent - possibly_lost)
    finally:
        journal.close()
    pending = read_pending(directory)
    return SyncSummary(
        directory, pending.run_id, redact(uri or ""), sent, pending.entries, len(read_refused(directory))
    )


@contextmanager
def _lease_of_folder(client: "MlflowClient", journal: Journal) -> Iterator[Lease | None]:
    """Yield the right to write to the run if the folder's process has never reached it; None if it has.

    Without it, the run's former writer would look like one that has taken the run over since.
    """
    if journal.lease is None or journal.lease.taken:
        yield None
        return
    lease = Lease(iters=journal.lease.iters, after=journal.lease.after)
    lease.directory = journal.directory
    journal.note_lease(replace(journal.lease, token=lease.token))
    lease.own_tokens = journal.tokens
    try:
        yield lease
        run_id = journal.run_id_of(journal.run or "")
        if lease.is_taken and is_created(run_id):
            lease.release(client, run_id)
    finally:
        lease.forget()


def _send(deliverer: Deliverer, reporter: Reporter, stop: StopFlag) -> int:
    sent, journal = 0, deliverer.journal
    with reporter.phase("sending to MLflow", journal.pending) as phase:
        while True:
            stop.check()
            try:
                arrived = deliverer.send_some()
            except TrackingError as error:
                raise TrackingError(
                    f"{error}; "
                    + counted(journal.pending, "entry has not been sent and is", "entries have not been sent and are")
                    + f" kept in {str(journal.path)!r}",
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
    counts = Counter(entry.kind for entry in entries)
    return ", ".join(counted(count, *_NOUNS.get(kind, (kind, kind))) for kind, count in counts.items())


_NOUNS = {
    "checkpoint": ("checkpoint", "checkpoints"),
    "metrics": ("step of metrics", "steps of metrics"),
    "params": ("set of parameters", "sets of parameters"),
    "tags": ("set of tags", "sets of tags"),
    "text": ("small file", "small files"),
    "input": ("data set", "data sets"),
    "note": ("description", "descriptions"),
    LogModels.kind: ("set of logged models", "sets of logged models"),
    "prune": ("round of pruning", "rounds of pruning"),
    "create": ("new run", "new runs"),
    "reopen": ("continued run", "continued runs"),
    "finish": ("end of a run", "ends of runs"),
    LoggedBatch.kind: ("call that logs", "calls that log"),
    LoggedInputs.kind: ("set of inputs", "sets of inputs"),
    LoggedFile.kind: ("file", "files"),
    RunUpdate.kind: ("status", "statuses"),
}
"""Kind of an entry -> what one, and what several, are called."""
