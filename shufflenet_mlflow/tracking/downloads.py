"""A download that is under way: the folder it lies in, and how far it has come."""

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.errors import BusyError
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.runtime.progress import Reporter

_MIB = 1 << 20

_PREFIX = ".fetch-"
_LOCK = "lock"


@contextlib.contextmanager
def shown(
    reporter: Reporter | None, scratch: Path, artifact: str, manifest: CheckpointManifest | None
) -> Iterator[None]:
    """Show how far a download has come: MLflow does not say, but the file grows."""
    if reporter is None or manifest is None:
        yield
        return
    name = artifact.rpartition("/")[2]
    ended = threading.Event()
    with reporter.phase(f"fetching {name}, MiB", -(-manifest.bytes // _MIB)) as phase:

        def watch() -> None:
            told = 0
            while not ended.wait(0.1):
                with contextlib.suppress(OSError):
                    arrived = sum(path.stat().st_size for path in scratch.rglob(name)) // _MIB
                    for _ in range(arrived - told):
                        phase.advance()
                    told = max(told, arrived)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder for a download, removed afterwards; those of killed processes are removed first.

    Raises:
        OSError: it cannot be made.
    """
    for stale in folder.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(BusyError, OSError):
            lock = FileLock(stale, "a download")
            try:
                shutil.rmtree(stale.parent)
            finally:
                lock.release()
    scratch, lock = _new_scratch(folder)
    try:
        yield scratch
    finally:
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def _new_scratch(folder: Path) -> tuple[Path, FileLock]:
    """A folder, and the lock that says that it is in use: before it is locked, another process takes it for stale."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        with contextlib.suppress(BusyError, FileNotFoundError):
            lock = FileLock(scratch / _LOCK, "a download")
            if (scratch / _LOCK).exists():
                return scratch, lock
            lock.release()
