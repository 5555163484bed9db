"""Checkpoints on the disk."""

import logging
from dataclasses import dataclass
from pathlib import Path

from shufflenet_mlflow.checkpoint.names import list_checkpoints, parse_name
from shufflenet_mlflow.checkpoint.verify import verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError, UnresolvedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """A verified checkpoint file."""

    path: Path
    iters: int
    """From the file's name; 0 if it is not called like a checkpoint."""
    run_id: str | None = None
    """The run it was fetched from; None for a file that was found on the disk."""


def resolve_file(path: Path) -> Resolved:
    """Verify one file.

    Raises:
        CheckpointError: it is corrupt or cannot be opened.
    """
    verify_checkpoint(path)
    name = parse_name(path.name)
    return Resolved(path, name.iters if name else 0)


def newest_valid(directory: Path) -> Resolved | None:
    """The newest checkpoint in `directory` that verifies; None if there is no checkpoint.

    Those that fail are named in the log and passed over.

    Raises:
        UnresolvedError: there are checkpoints, and all of them failed.
    """
    failures: list[CheckpointError] = []
    for path in list_checkpoints(directory):
        try:
            resolved = resolve_file(path)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            failures.append(error)
            continue
        logger.debug("the newest checkpoint in %s that verifies: %s", directory, path.name)
        return resolved
    if failures:
        raise UnresolvedError(
            f"{str(directory)!r}: none of its {len(failures)} checkpoints verifies; the newest: {failures[0]}"
        )
    return None
