"""A download in progress: its scratch folder, and its progress."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.errors import BusyError
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.watching import watching

_MIB = 1 << 20

_PREFIX = ".fetch-"
_LOCK = "lock"


@contextlib.contextmanager
def shown(
    reporter: Reporter | None, scratch: Path, artifact: str, manifest: CheckpointManifest | None
) -> Iterator[None]:
    """Show the progress of a download from the growing file, since MLflow does not report it."""
    if reporter is None or manifest is None:
        yield
        return
    name = artifact.rpartition("/")[2]
    reported = 0
    with reporter.phase(f"fetching {name}, MiB", -(-manifest.bytes // _MIB)) as phase:

        def report() -> bool:
            nonlocal reported
            with contextlib.suppress(OSError):
                arrived = sum(path.stat().st_size for path in scratch.rglob(name)) // _MIB
                for _ in range(arrived - reported):
                    phase.advance()
                reported = max(reported, arrived)
            return False

        with watching(report, seconds=0.1, name="download progress"):
            yield


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder for a download, and remove it afterwards; remove those of killed processes first.

    Raises:
        OSError: the folder cannot be created.
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
    """Create a folder with the lock that marks it as in use; until it is locked, other processes may remove it."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        with contextlib.suppress(BusyError, FileNotFoundError):
            lock = FileLock(scratch / _LOCK, "a download")
            if (scratch / _LOCK).exists():
                return scratch, lock
            lock.release()
