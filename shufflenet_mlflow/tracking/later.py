"""Say something of a run that has ended: now if MLflow answers, or through the journal in its folder."""

from pathlib import Path

from shufflenet_mlflow.errors import BusyError, JournalError, TrackingError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.target import Message, RunTarget


def send_or_keep(store: Connection, run_id: str | None, directory: Path, message: Message, reporter: Reporter) -> None:
    """Send a message to a run; where it cannot be sent, or other messages wait, it waits with them.

    Args:
        run_id: None until MLflow has created the run.
        directory: folder of its checkpoints, which another machine may have instead.
    """
    if run_id is not None and not read_pending(directory).entries:
        try:
            with store.impatient(), mlflow_errors(f"write to run {run_id}"):
                message.send(RunTarget(store.client, run_id, directory))
            return
        except TrackingError as error:
            reporter.warn(f"{error}; it is sent again later")
    if not directory.is_dir():
        return
    try:
        journal = Journal(directory)
    except (BusyError, JournalError) as error:
        reporter.warn(str(error))
        return
    try:
        if journal.run is not None:
            journal.append(journal.run, message.kind, to_body(message))
    finally:
        journal.close()
