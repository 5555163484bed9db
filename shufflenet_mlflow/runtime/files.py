"""Write files that are either complete or not there.

This is the only place that does so: write to a temporary name in the same folder, flush, fsync, rename, fsync the
folder.
"""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Callable
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
