"""Write files that are either complete or not there.

This is the only place that does so: write to a temporary name in the same folder, flush, fsync, rename, fsync the
folder.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_CHUNK = 1 << 20


def temporary_beside(path: Path) -> Path:
    """Return a fresh hidden name in the folder of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_temporaries(directory: Path) -> None:
    """Remove what killed writers left in `directory`; call it while nobody writes there."""
    if directory.is_dir():
        for entry in directory.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


def sync_folder(directory: Path) -> None:
    """Make renames and removals in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, flags: int) -> int:
    """Open, or create, a regular file in a folder that may come from a stranger; return its descriptor.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device: a link could lead to any file of the user's.
    """
    options = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        descriptor = os.open(path, flags | options, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, f"{path.name} is a link, a pipe or a device, and only a regular file is opened")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `folder` once the block has filled it, or else removed.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        OSError: it cannot be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "it exists and is not empty", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o755)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that is renamed to `path` once it is complete and on the disk.

    Raises:
        OSError: writing failed; `path` is as it was before.
    """
    aside = temporary_beside(path)
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_of(file: BinaryIO) -> str:
    """Return the hex digest of all of `file`, which is left at its start."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()
