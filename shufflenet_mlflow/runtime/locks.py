"""Locks that end with their process, so that a killed process leaves no stale lock."""

import errno
import os
import sys
from pathlib import Path

from shufflenet_mlflow.errors import BusyError

_locked: set[str] = set()
"""Files that this process has locked: closing another descriptor of such a file would release its lock."""


class FileLock:
    """An exclusive lock on a file, held by this process until `release` or its end.

    A POSIX record lock: unlike one of `flock`, it is not inherited by data loading workers, which may outlive a killed
    parent by seconds.

    Raises:
        BusyError: another process holds it.
        OSError: the file cannot be created or locked.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._name = os.path.realpath(path)
        if self._name in _locked:
            raise BusyError(
                f"{what} is in use by this process already; close it there first", code="locked-by-this-process"
            )
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        if sys.platform != "win32":  # which has no record locks: other processes are not locked out
            import fcntl

            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()
                os.close(self._descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):  # most likely a file system without locks
                    raise
                raise BusyError(
                    f"{what} is in use by process {holder or '?'}; wait for it, or stop it",
                    code="locked-by-other-process",
                ) from error
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        _locked.add(self._name)

    def release(self) -> None:
        """Release the lock."""
        _locked.discard(self._name)
        os.close(self._descriptor)
