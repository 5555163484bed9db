"""The journals of the runs that this process logs to through `durable+http://…`, each with a thread that empties it.

Each run has a folder, `mlflow-journal/RUN_ID`. While a process works there, the next one takes a folder within it,
`process-2` and so on, so that the ranks of a distributed training keep one file each. A process that starts takes the
first free folder, and delivers what an earlier one has left there.
"""

import atexit
import contextlib
import logging
import os
import re
import shutil
import threading
import time
from itertools import count
from pathlib import Path
from shlex import quote

from shufflenet_mlflow.errors import BusyError, JournalError
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import connect
from shufflenet_mlflow.tracking.delivery import Deliverer, Delivery, tell_what_is_left
from shufflenet_mlflow.tracking.journal import LOCK_NAME, Journal
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, read_pending
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
from shufflenet_mlflow.tracking.logged import FILES_FOLDER, LoggedFile
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.refused import REFUSED_NAME
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.trust import remember_store
from shufflenet_mlflow.tracking.uris import stored_uri

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MLFLOW_DURABLE_DIR"
"""Variable that names the folder of the journals."""
DEFAULT_FOLDER = "mlflow-journal"
PROCESS_FOLDER = "process-"

MOMENT_SECONDS = 1.5
"""Seconds that reading a run, ending it or uploading a file waits for what is pending."""
END_SECONDS = 10.0
"""Seconds that the end of the process waits for a server that does not answer."""

_ATTEMPTS = 20
"""Attempts to open a folder that another process is just removing."""


class RunJournal:
    """The journal of one folder, and the thread that empties it.

    Args:
        uri: address of the server.

    Raises:
        BusyError: another process has the folder.
        JournalError: the journal cannot be read or written.
    """

    def __init__(self, uri: str, run_id: str, directory: Path) -> None:
        self.directory = directory
        self.journal = Journal(directory)
        try:
            self.journal.set_owner(run_id, stored_uri(uri))
            self._reporter = LoggingReporter()
            client = connect(uri, at_once=False)  # what opens it is the thread
            deliverer = Deliverer(client, self.journal, TRACKING_KINDS)
            self.delivery = Delivery(deliverer, self._reporter)
        except BaseException:
            self.journal.close()
            raise
        self.run_id = run_id
        self._has_warned = self._is_slow = False
        if self.journal.pending:
            self.delivery.wake()

    def record(self, message: Message) -> None:
        """Put a message into the journal.

        On a full disk it stays in memory, which a warning says once.
        """
        self.journal.append(self.run_id, message.kind, to_body(message))
        if self.journal.failure and not self._has_warned:
            self._has_warned = True
            self._reporter.warn(f"{self.journal.failure}; until there is room, what is logged is kept in memory only")
        self.delivery.wake()

    def wait(self, seconds: float) -> bool:
        """Wait until everything has arrived, or sending has failed; return whether everything has arrived.

        A moment is not waited for again as long as something is pending for which one was in vain.
        """
        if not (self._is_slow and seconds <= MOMENT_SECONDS):
            self._is_slow = not self.delivery.wait_briefly(seconds)
        has_arrived = self.journal.pending == 0
        self._is_slow = self._is_slow and not has_arrived
        return has_arrived

    def finish(self, seconds: float) -> None:
        """Deliver what is left at the end of the process, and say what stays."""
        error = self.delivery.error
        if error is None or not error.answered:
            with contextlib.suppress(KeyboardInterrupt):
                self.delivery.wait(StopFlag(), give_up=seconds)
        tell_what_is_left(self.delivery, self._reporter)
        self.close()

    def close(self) -> None:
        """End the thread, close the journal, and remove its folder if nothing is left there."""
        self.delivery.close()
        if not _removed(self.journal):
            return
        top = _top_folder()
        for folder in self.directory.parents:
            if folder not in (top, *top.glob("*")):
                break
            with contextlib.suppress(OSError):
                folder.rmdir()


def _removed(journal: Journal) -> bool:
    """Close a journal, and remove it with its folder if nothing is left there; return whether it was."""
    if journal.pending or os.path.exists(journal.directory / REFUSED_NAME):
        journal.close()
        return False
    shutil.rmtree(journal.directory / FILES_FOLDER, ignore_errors=True)
    journal.remove()
    return True


def remove_empty(directory: Path) -> None:
    """Remove a run's journal in which nothing is left, with its folder; a folder of checkpoints stays as it is.

    Raises:
        BusyError: a process works there.
    """
    folder = directory.absolute()
    is_ours = DEFAULT_FOLDER in folder.parts or _top_folder() in folder.parents
    names = {path.name for path in folder.iterdir()} if is_ours else set()
    if JOURNAL_NAME in names and names <= {JOURNAL_NAME, LOCK_NAME, FILES_FOLDER}:
        _removed(Journal(directory))


_open: dict[tuple[str, str], list[RunJournal]] = {}
"""Server and run -> the journal that this process writes to, and behind it those that others have left."""
_mutex = threading.RLock()
_has_waited = False
"""The process ends, and has waited for a server that does not answer."""


def _top_folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).absolute()


def folder_of(run_id: str) -> Path:
    """Return the folder of a run's journals."""
    return _top_folder() / run_id


def folders_of_journals(directory: Path) -> list[Path]:
    """Return the folders of runs, and of a run's further processes, in a folder."""
    names = re.compile(rf"[0-9a-f]{{32}}|{PROCESS_FOLDER}\d+")
    with contextlib.suppress(OSError):
        return sorted(folder for folder in directory.iterdir() if names.fullmatch(folder.name) and folder.is_dir())
    return []


def record(uri: str, run_id: str, message: Message) -> None:
    """Put a message to a run into its journal.

    Raises:
        JournalError: there can be no journal.
    """
    with _mutex:
        try:
            _journal_of(uri, run_id).record(message)
        except RuntimeError as error:
            if "interpreter shutdown" not in str(error):  # no thread starts any more, from Python 3.12 on
                raise
            _record_at_the_end(uri, run_id, message)


def _record_at_the_end(uri: str, run_id: str, message: Message) -> None:
    """Put a message into the journal when no thread can deliver it any more."""
    directory = folder_of(run_id)
    with contextlib.closing(Journal(directory)) as journal:
        journal.set_owner(run_id, stored_uri(uri))
        journal.append(run_id, message.kind, to_body(message))
    logger.warning(
        "the process ends: what was logged last is on the disk, and `shufflenet sync %s` brings it to the run",
        quote(str(directory)),
    )


def record_file(uri: str, run_id: str, path: Path, folder: str) -> None:
    """Put a copy of a file into the run's journal, to be uploaded into a folder of its artifacts.

    Raises:
        OSError: it cannot be copied.
        JournalError: there can be no journal.
    """
    while True:
        with _mutex:
            journal = _journal_of(uri, run_id)
        message = LoggedFile.copy_of(path, folder, journal.directory)  # others log meanwhile: it may be large
        with _mutex:
            if journal in _open.get((uri, run_id), ()):
                journal.record(message)
                return
        message.remove_copy(journal.directory)  # another thread has ended the run, and so closed its journal


def wait(uri: str, run_id: str, seconds: float = MOMENT_SECONDS) -> bool:
    """Wait until what is pending for a run has arrived, or sending has failed; return whether it has arrived."""
    ends = time.monotonic() + seconds
    return all(journal.wait(max(0.0, ends - time.monotonic())) for journal in _open.get((uri, run_id), ()))


def wait_for_all(uri: str, seconds: float = MOMENT_SECONDS) -> bool:
    """Do the same for all runs of a server."""
    ends = time.monotonic() + seconds
    runs = [run_id for known, run_id in list(_open) if known == uri]
    return all(wait(uri, run_id, max(0.0, ends - time.monotonic())) for run_id in runs)


def let_go(uri: str, run_id: str) -> None:
    """Close the journals of a run that has ended, if nothing is pending in them."""
    with _mutex:
        left = [journal for journal in _open.get((uri, run_id), ()) if journal.journal.pending]
        for journal in _open.pop((uri, run_id), ()):
            if journal not in left:
                journal.close()
        if left:
            _open[uri, run_id] = left


def _journal_of(uri: str, run_id: str) -> RunJournal:
    found = _open.get((uri, run_id))
    if found:
        return found[0]
    own = _open_free(uri, run_id)
    remember_store(uri)
    _open[uri, run_id] = [own, *_left_by_others(uri, run_id)]
    return own


def _open_free(uri: str, run_id: str) -> RunJournal:
    """Open the first folder of a run in which no process works."""
    folder = folder_of(run_id)
    for number in count(1):
        for attempt in range(_ATTEMPTS):
            try:
                return RunJournal(uri, run_id, folder if number == 1 else folder / f"{PROCESS_FOLDER}{number}")
            except BusyError:
                break
            except JournalError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.01)
    raise AssertionError("numbers do not end")


def _left_by_others(uri: str, run_id: str) -> list[RunJournal]:
    """Open the journals that processes have left which no longer run; their entries are delivered beside ours."""
    found = []
    for folder in sorted(folder_of(run_id).glob(f"{PROCESS_FOLDER}*")):
        with contextlib.suppress(BusyError, JournalError):
            if read_pending(folder).entries:
                found.append(RunJournal(uri, run_id, folder))
    return found


def _deliver_before_pools_end() -> None:
    """Deliver what is there when the main thread has ended; afterwards thread pools, which uploads use, are closed."""
    global _has_waited
    ends = time.monotonic() + END_SECONDS
    for journals in list(_open.values()):
        for journal in journals:
            if not journal.delivery.wait(StopFlag(), give_up=max(0.1, ends - time.monotonic())):
                _has_waited = True


def finish_all() -> None:
    """Deliver what is left at the end of the process, and say what stays."""
    ends = time.monotonic() + (MOMENT_SECONDS if _has_waited else END_SECONDS)
    with _mutex:
        while _open:
            for journal in _open.popitem()[1]:
                journal.finish(max(0.1, ends - time.monotonic()))


getattr(threading, "_register_atexit", atexit.register)(_deliver_before_pools_end)


def _in_child() -> None:
    global _mutex
    _open.clear()  # the threads, and the locks of the folders, are the parent's
    _mutex = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
