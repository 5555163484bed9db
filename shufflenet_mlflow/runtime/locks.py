"""Locks that end with their process, so that a killed process leaves no stale lock."""

import errno
import os
import sys
from pathlib import Path

from shufflenet_mlflow.errors import BusyError
from shufflenet_mlflow.runtime.files import open_regular

_locked: set[str] = set()
"""Files that this process has locked: closing another descriptor of such a file would release its lock."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locked.clear)  # a child has none of its parent's locks


class FileLock:
    """An exclusive lock on a file, held by this process until `release` or its end.

    A POSIX record lock: unlike one of `flock`, it is not inherited by data loading workers, which may outlive a killed
    parent by seconds.

    Raises:
        BusyError: another process holds it.
        OSError: the file cannot be created or locked, or is a link.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._name = os.path.realpath(path)
        if self._name in _locked:
            raise BusyError(
                f"{what} is in use by this process already; close it there first", code="locked-by-this-process"
            )
        self._descriptor = _locked_file(path, what)
        while not _is_there(path, self._descriptor):  # its last holder has removed it meanwhile
            os.close(self._descriptor)
            self._descriptor = _locked_file(path, what)
        _locked.add(self._name)

    def release(self) -> None:
        """Release the lock."""
        _locked.discard(self._name)
        os.close(self._descriptor)


def _locked_file(path: Path, what: str) -> int:
    """Open and lock a file; return its descriptor."""
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    if sys.platform != "win32":  # which has no record locks: other processes are not locked out
        import fcntl

        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # most likely a file system without locks
                raise
            raise BusyError(
                f"{what} is in use by process {holder or '?'}; wait for it, or stop it",
                code="locked-by-other-process",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
