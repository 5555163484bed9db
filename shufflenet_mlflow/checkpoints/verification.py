"""Read checkpoints: verified first, and never running code from the file.

`torch.load` does not check the CRCs of the zip file it reads, so one flipped bit would load silently. Here every
member's CRC is checked before anything is loaded, and size and SHA-256 if there is a manifest.
"""

import collections
import contextlib
import errno
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from shufflenet_mlflow.checkpoints.claims import LARGEST_PICKLE, FalseClaimError, check_claims
from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import parse_name
from shufflenet_mlflow.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnreadableCheckpointError,
    UnsafeCheckpointError,
)
from shufflenet_mlflow.runtime.files import sha256_of

_DOS_FOLDER = 0x10
_ZIP_MAGIC = b"PK\x03\x04"
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|global ([\w.]+)|class '?([\w.]+)")


class VerifiedCheckpoint:
    """A checkpoint file that passed verification; its content is loaded when it is first read, and once."""

    def __init__(
        self, path: Path, manifest: CheckpointManifest | None, identity: tuple[int, ...], payload: Any = None
    ) -> None:
        self.path = path
        self._manifest = manifest
        self._identity = identity
        self._payload = payload

    def rename(self, path: Path) -> None:
        """Rename the file, replacing any other; it stays the verified one.

        Raises:
            OSError: it could not be renamed.
        """
        with _opened(self.path) as file:
            is_verified = _identity(file) == self._identity
            os.replace(self.path, path)
            if is_verified:
                self._identity = _identity(file)  # renaming has changed it
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return the dict that was saved, on the CPU; running none of the file's code.

        A file that was replaced or written to since its verification began is verified again.

        Raises:
            CorruptCheckpointError: the file was replaced, and verification failed; or it is being written to.
            UnsafeCheckpointError: the file holds more than tensors and plain containers.
            UnreadableCheckpointError: the disk does not give the file.
            CheckpointError: the file does not exist, or holds something else than a checkpoint.
        """
        if self._payload is None:
            with _opened(self.path) as file, _io_errors(self.path):
                identity = _identity(file)
                if identity != self._identity:
                    _verify(self.path, file, self._manifest)
                payload = _load(self.path, file)
                if _identity(file) != identity:
                    raise CorruptCheckpointError(
                        f"{str(self.path)!r} was written to while it was read; try again once nothing writes to it",
                        code="checkpoint-being-written",
                    )
            self._identity, self._payload = identity, payload
        if not isinstance(self._payload, dict):
            raise CheckpointError(
                f"{str(self.path)!r} holds a {type(self._payload).__name__}, not a checkpoint", code="payload-not-dict"
            )
        return self._payload


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """Return what changes when the file is replaced or written to.

    That includes the time of the last change of its status, which programs cannot set back, unlike the other one.
    """
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_checkpoint(path: str | Path, manifest: CheckpointManifest | None = None) -> VerifiedCheckpoint:
    """Verify a checkpoint file, and return it ready to be read.

    A file in PyTorch's old pickle format has no checksums; it is loaded to see whether it can be.

    Args:
        manifest: the expected size and hash; by default the manifest beside the file, if there is one.

    Raises:
        CorruptCheckpointError: the file is truncated or altered, or does not match the manifest.
        UnreadableCheckpointError: the disk does not give the file.
        CheckpointError: the file does not exist.
    """
    path = Path(path)
    with _opened(path) as file, _io_errors(path):
        if manifest is None:
            manifest = read_manifest(path)
            _check_name(path, manifest)
        identity = _identity(file)
        payload = _verify(path, file, manifest)
        return VerifiedCheckpoint(path, manifest, identity, payload)


def _check_name(path: Path, manifest: CheckpointManifest | None) -> None:
    """Raise CorruptCheckpointError if a checkpoint and its manifest were copied to the name of another iteration."""
    name = parse_name(path.name)
    if manifest is not None and name is not None and name.iters != manifest.iters:
        raise CorruptCheckpointError(
            f"{str(path)!r} is another checkpoint: its manifest is that of {manifest.file_name!r}, iteration "
            f"{manifest.iters:,}",
            code="manifest-of-another",
        )


def verify_checkpoint(path: str | Path, manifest: CheckpointManifest | None = None) -> None:
    """Verify a checkpoint file; arguments and errors are those of `open_checkpoint`."""
    open_checkpoint(path, manifest)


def read_checkpoint(path: str | Path, manifest: CheckpointManifest | None = None) -> dict[str, Any]:
    """Verify a checkpoint file, then load it; see `open_checkpoint` and `VerifiedCheckpoint.read`."""
    return open_checkpoint(path, manifest).read()


def has_checksums(path: str | Path) -> bool:
    """Whether a checkpoint file has checksums to verify: it is a zip file, or has a manifest."""
    path = Path(path)
    with _opened(path) as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC or read_manifest(path) is not None


def _opened(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"the checkpoint {str(path)!r} is not a file", code="checkpoint-not-file")
        return open(path, "rb")
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint {str(path)!r} does not exist", code="checkpoint-missing") from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | str) -> UnreadableCheckpointError:
    reason = error if isinstance(error, str) else error.strerror or str(error)
    return UnreadableCheckpointError(
        f"cannot read the checkpoint {str(path)!r}: {reason}; make it readable, or move it elsewhere to go on "
        "without it",
        code="checkpoint-unreadable",
    )


@contextlib.contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that does not blame the file."""
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _blames_the_disk(error: BaseException) -> bool:
    """Whether an error while reading says nothing about the content.

    A damaged file can lead to a place that does not exist, which is also an OSError.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EOVERFLOW)


def _verify(path: Path, file: BinaryIO, manifest: CheckpointManifest | None) -> Any:
    """Return what a file in the old format holds, since it was loaded for that; otherwise None."""
    if manifest is not None:
        size = os.fstat(file.fileno()).st_size
        if size != manifest.bytes:
            raise CorruptCheckpointError(
                f"{str(path)!r} is corrupt: it has {size} bytes, its manifest says {manifest.bytes}",
                code="size-mismatch",
            )
        if sha256_of(file) != manifest.sha256:
            raise CorruptCheckpointError(
                f"{str(path)!r} is corrupt: its SHA-256 is not the recorded {manifest.sha256[:12]}…",
                code="sha256-mismatch",
            )
    file.seek(0)
    magic = file.read(len(_ZIP_MAGIC))
    file.seek(0)
    if magic == _ZIP_MAGIC:
        _verify_zip(path, file)
        return None
    if not magic:
        raise CorruptCheckpointError(f"{str(path)!r} is corrupt: it is empty", code="checkpoint-empty")
    return _load(path, file)


def _verify_zip(path: Path, file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            strange = _strange_member(archive.infolist(), os.fstat(file.fileno()).st_size)
            bad = archive.testzip() if strange is None else None  # a compressed member could be of any size
            if strange is None and bad is None:
                _check_pickle(archive)
    except Exception as error:
        if _blames_the_disk(error):
            raise
        whole = str(error) != "File is not a zip file"  # whose directory stands at its end
        reason = str(error) if whole else "it was cut short; fetch or copy it again"
        raise CorruptCheckpointError(f"{str(path)!r} is corrupt: {reason}", code="zip-damaged") from error
    if strange is not None:
        raise CorruptCheckpointError(
            f"{str(path)!r} is corrupt: PyTorch does not write a member like {strange!r}", code="zip-member-invalid"
        )
    if bad is not None:
        raise CorruptCheckpointError(f"{str(path)!r} is corrupt: the CRC of {bad!r} is wrong", code="crc-mismatch")
    file.seek(0)


def _check_pickle(archive: zipfile.ZipFile) -> None:
    """Compare the pickle's claims about its storages with the members that hold them."""
    root = archive.namelist()[0].partition("/")[0]
    sizes = {member.filename: member.file_size for member in archive.infolist()}
    size = sizes.get(f"{root}/data.pkl")
    if size is None:
        return  # loading says what is missing
    if size > LARGEST_PICKLE:
        raise FalseClaimError(f"its data.pkl has {size} bytes, more than PyTorch writes for any network")
    folder = f"{root}/data/"
    storages = {name.removeprefix(folder): size for name, size in sizes.items() if name.startswith(folder)}
    check_claims(archive.read(f"{root}/data.pkl"), storages)


def _strange_member(members: list[zipfile.ZipInfo], total: int) -> str | None:
    """Return the name of a member that PyTorch's reader might read differently from Python's, or None.

    One flipped bit in the zip directory is enough: PyTorch reads a tensor that is marked as a folder as uninitialised
    memory, although its CRC is right.
    """
    names = collections.Counter(member.filename for member in members)
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < end or member.file_size != member.compress_size:  # they overlap
            return member.filename
        end = member.header_offset + member.file_size
        if end > total:
            return member.filename
    for member in members:
        is_folder = member.is_dir() or member.external_attr & _DOS_FOLDER
        if is_folder or member.compress_type != zipfile.ZIP_STORED or names[member.filename] > 1:
            return member.filename
    return None


MOST_VALUES = 5_000_000
"""Values in a checkpoint, a tensor counting as one; those of large networks have some thousands."""


def _require_finite(payload: Any) -> None:
    """Raise RuntimeError if a payload is too large once it is written out.

    A list that holds another one ten times, which holds another one ten times, is small in memory and in the file.
    """
    waiting, count = [payload], 1
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            continue
        parts = [value] if not isinstance(value, Mapping) else [value, value.values()]
        count += sum(map(len, parts))
        if count > MOST_VALUES:
            raise RuntimeError(f"it holds more than {MOST_VALUES} values, most of them in several places")
        for part in parts:
            waiting.extend(part)


def _load(path: Path, file: BinaryIO) -> Any:
    import torch  # a second: what only looks for checkpoints does not wait for it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            payload = torch.load(file, map_location="cpu", weights_only=True)
            _require_finite(payload)
            return payload
    except pickle.UnpicklingError as error:
        match = _GLOBAL.search(str(error))
        if match is None:
            raise CorruptCheckpointError(
                f"{str(path)!r} is not a readable checkpoint: it is damaged, or not a file that torch.save wrote",
                code="not-a-torch-file",
            ) from error
        culprit = next(group for group in match.groups() if group)
        raise UnsafeCheckpointError(
            f"{str(path)!r} is refused: it holds a {culprit}, which is more than tensors and plain "
            "containers; save it again as {'state_dict': model.state_dict()}",
            code="unsafe-content",
        ) from error
    except Exception as error:
        if _blames_the_disk(error):
            raise
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise _unreadable(path, "there is not enough memory") from error
        told = isinstance(error, (RuntimeError, EOFError)) and str(error)
        reason = str(error).splitlines()[0] if told else "it is damaged, or not a file that torch.save wrote"
        raise CorruptCheckpointError(
            f"{str(path)!r} is not a readable checkpoint: {reason}", code="torch-load-failed"
        ) from error
