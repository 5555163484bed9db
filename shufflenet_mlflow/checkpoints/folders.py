"""List, choose and delete the checkpoints of a folder."""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shufflenet_mlflow.checkpoints.manifest import MANIFEST_SUFFIX, CheckpointManifest, manifest_path, read_manifest
from shufflenet_mlflow.checkpoints.names import newest_first, parse_name
from shufflenet_mlflow.checkpoints.verification import VerifiedCheckpoint, open_checkpoint
from shufflenet_mlflow.errors import CheckpointError, UnreadableCheckpointError, UnresolvedError
from shufflenet_mlflow.runtime.files import remove_temporaries, sync_folder, temporary_beside

logger = logging.getLogger(__name__)


def list_manifests(directory: Path) -> list[CheckpointManifest]:
    """Return the manifests of the checkpoints in `directory`, newest first; skip files without one."""
    manifests = (read_manifest(path) for path in list_checkpoints(directory))
    return [manifest for manifest in manifests if manifest is not None]


def delete_checkpoint(path: Path) -> int:
    """Delete a checkpoint and its manifest.

    The file loses its name first, so that no reader opens it; then it is removed. `remove_leftovers` removes what a
    process leaves that is killed in between.

    Returns:
        Bytes that were freed.

    Raises:
        OSError: it could not be deleted.
    """
    size = path.stat().st_size
    nameless = temporary_beside(path)
    os.replace(path, nameless)
    sync_folder(path.parent)
    nameless.unlink()
    manifest_path(path).unlink(missing_ok=True)
    return size


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left in `directory`; call while no process writes there."""
    if not directory.is_dir():
        return
    with contextlib.suppress(OSError):  # a folder that cannot be written says so when something is saved
        remove_temporaries(directory)
        for entry in directory.iterdir():
            name = entry.name.removesuffix(MANIFEST_SUFFIX)
            is_alone = name != entry.name and parse_name(name) is not None and not (directory / name).exists()
            if is_alone and read_manifest(directory / name) is not None:
                entry.unlink(missing_ok=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint files in `directory`, newest first; [] if there is no such folder.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    if not os.path.isdir(directory):  # unlike Path.is_dir, never raises
        return []
    try:
        names = [entry.name for entry in directory.iterdir() if entry.is_file()]
    except OSError as error:
        raise CheckpointError(
            f"cannot read the folder {str(directory)!r}: {error.strerror}", code="folder-unreadable"
        ) from error
    return [directory / name for name in newest_first(names)]


@dataclass(frozen=True)
class Resolved:
    """The verified file that a checkpoint reference names."""

    checkpoint: VerifiedCheckpoint
    run_id: str | None = None
    """The run that it was fetched from; None for a file that was found on the disk."""
    writer: str | None = None
    """Token of the process that had that run when it was fetched; None if that is not known."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path

    @property
    def iters(self) -> int:
        """Iterations, from the file's name; 0 if it is not named like a checkpoint."""
        name = parse_name(self.path.name)
        return name.iters if name is not None else 0


def resolve_file(path: Path) -> Resolved:
    """Verify one file and return it.

    Raises:
        CheckpointError: it is corrupt or cannot be opened.
    """
    return Resolved(open_checkpoint(path))


def newest_valid(
    directory: Path, accepts: Callable[[VerifiedCheckpoint], bool] = lambda checkpoint: True
) -> Resolved | None:
    """Return the newest checkpoint in `directory` that verifies; None if there is no checkpoint.

    Those that fail are named in the log and skipped. One that cannot be read may be intact: an older one does not
    take its place.

    Args:
        accepts: says whether a checkpoint that verifies is meant.

    Raises:
        UnreadableCheckpointError: the disk does not give the newest one.
        UnresolvedError: there are checkpoints, and all of them failed.
    """
    failures: list[CheckpointError] = []
    for path in list_checkpoints(directory):
        try:
            resolved = resolve_file(path)
        except UnreadableCheckpointError:
            raise
        except CheckpointError as error:
            logger.warning("skipped: %s", error)
            failures.append(error)
            continue
        if accepts(resolved.checkpoint):
            logger.debug("the newest checkpoint in %s that verifies: %s", directory, path.name)
            return resolved
    if failures:
        raise UnresolvedError(
            f"{str(directory)!r}: no checkpoint verifies ({len(failures)} tried); the newest: {failures[0]}",
            code="none-verifies",
        )
    return None
