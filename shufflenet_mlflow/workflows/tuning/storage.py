"""The Optuna storage of a study: a journal file beside the checkpoints, or any storage with an address."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import StudyError
from shufflenet_mlflow.runtime.files import open_regular, sync_folder
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.workflows.tuning.sampling import optuna

_RACES = (0.2, 0.5, 1.0, 2.0)
"""Seconds before a database is opened again whose tables another worker has made meanwhile."""

STUDY_FILE = "study.jsonl"
"""The journal of Optuna in the study's folder."""


@contextmanager
def storage_errors(doing: str, where: str) -> Iterator[None]:
    """Turn what a storage raises into an error of one line.

    Args:
        doing: completes "cannot …".
        where: the storage's address.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, OSError, ImportError, ValueError, optuna().exceptions.OptunaError) as error:
        lines = str(getattr(error, "__cause__", None) or error).strip().splitlines()
        reason = redact(lines[0])[:300] if lines else type(error).__name__
        if isinstance(error, ImportError):
            reason += ", which the address asks for: install it, or name another driver, as in postgresql+psycopg2://"
        raise StudyError(
            f"cannot {doing} in the study's storage {redact(where)!r}: {reason}; --storage names another",
            code="study-storage",
        ) from None  # what a database raises holds its address with the password


def open_storage(address: str | None, save_dir: Path, *, create: bool = True) -> Any:
    """Return Optuna's storage; None if it is a file that does not exist, and is not to be made.

    Args:
        address: what `--storage` names; None for the file in the study's folder.

    Raises:
        StudyError: it cannot be opened.
    """
    storages = optuna().storages
    if address is not None:
        with storage_errors("work", address):
            return _opened(address)
    path = save_dir / STUDY_FILE
    if not create and not path.exists():
        return None
    with storage_errors("work", str(path)):
        is_new = not save_dir.exists()
        save_dir.mkdir(parents=True, exist_ok=True)
        try:
            storage = storages.JournalStorage(_journal(path))
        except ValueError as error:  # of JSON, or of its encoding
            raise StudyError(
                f"the record of the study, {str(path)!r}, is damaged; move it away, and the study is restored from "
                "MLflow",
                code="study-record-damaged",
            ) from error
        if is_new:
            sync_folder(save_dir.parent)
        sync_folder(save_dir)
        return storage


def _opened(address: str) -> Any:
    """Open a storage in a database; of two workers that make its tables at once, one has to look again."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for pause in _RACES:
        try:
            return optuna().storages.get_storage(address)
        except (IntegrityError, ProgrammingError):
            time.sleep(pause)
    return optuna().storages.get_storage(address)


def _journal(path: Path) -> Any:
    """Return Optuna's journal file, with a lock that ends with its process, which cuts off the end of a killed one."""
    backends = optuna().storages.journal

    class Journal(backends.JournalFileBackend):  # type: ignore[misc, name-defined]
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            with lock:
                _cut_half_a_line(path)
                super().append_logs(logs)

    lock = _Lock(path.with_name(f"{path.name}.lock"))
    os.close(open_regular(path, os.O_RDWR | os.O_CREAT))
    return Journal(str(path), lock_obj=_NoLock())


class _NoLock:
    """Takes the place of Optuna's own lock, which a killed process leaves behind for half a minute."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class _Lock:
    """Excludes other processes, and other threads of this one; waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.Lock()

    def __enter__(self) -> None:
        self._threads.acquire()
        self._descriptor = open_regular(self._path, os.O_RDWR | os.O_CREAT)
        try:
            import fcntl
        except ImportError:  # Windows, where several processes cannot share the file
            return
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_exception: object) -> None:
        os.close(self._descriptor)
        self._threads.release()


def _cut_half_a_line(path: Path) -> None:
    """Cut off what a process that was killed while it appended has left."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        position = size
        while position:
            begin = max(0, position - 4096)
            file.seek(begin)
            newline = file.read(position - begin).rfind(b"\n")
            if newline >= 0:
                file.truncate(begin + newline + 1)
                return
            position = begin
        file.truncate(0)


def study_id(storage: Any, name: str) -> int | None:
    """Return the number of a study in its storage; None if it is not there."""
    try:
        return int(storage.get_study_id_from_name(name))
    except KeyError:
        return None


def create_study(storage: Any, name: str, direction: str, attributes: Mapping[str, Any]) -> int:
    """Make a study with its attributes, unless another process has; return its number."""
    known = study_id(storage, name)
    if known is None:
        of = optuna().study.StudyDirection
        try:
            known = int(storage.create_new_study([of[direction.upper()]], study_name=name))
        except optuna().exceptions.DuplicatedStudyError:
            known = int(storage.get_study_id_from_name(name))
    there = storage.get_study_user_attrs(known)
    for key, value in attributes.items():
        if key not in there:
            storage.set_study_user_attr(known, key, value)
    return known
