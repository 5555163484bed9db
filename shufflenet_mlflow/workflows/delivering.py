"""Deliver to MLflow, or count, the entries that still wait in the folders of several runs."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shufflenet_mlflow.errors import BusyError, JournalError, TrackingError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.workflows.sync import run_sync


def deliver_folders(folders: Sequence[Path], tracking_uri: str | None, reporter: Reporter, stop: StopFlag) -> int:
    """Send what waits in these folders, a parent's before its children's.

    After a signal, and once MLflow does not answer, nothing more is sent.

    Returns:
        The number of entries that still wait.
    """
    sends = stop.signum is None
    for folder in folders:
        sends = sends and _send(folder, tracking_uri, reporter, stop)
    return sum(map(count_pending, folders))


def _send(folder: Path, tracking_uri: str | None, reporter: Reporter, stop: StopFlag) -> bool:
    """Send what waits in a folder; return False if trying the next one is of no use."""
    if not count_pending(folder):
        return True
    try:
        run_sync(folder, dry_run=False, tracking_uri=tracking_uri, reporter=reporter, stop=stop)
    except (BusyError, JournalError):  # another worker is at work there, and delivers
        return True
    except StopRequested:
        return False
    except TrackingError as error:
        reporter.warn(str(error))
        return error.answered
    return True


def count_pending(folder: Path) -> int:
    """Return the number of entries that wait in a folder; 0 if its journal cannot be read."""
    with suppress(JournalError):
        return len(read_pending(folder).entries)
    return 0
