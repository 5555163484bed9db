"""Where checkpoints and metrics of a training go: two small protocols, a folder, and nowhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from shufflenet_mlflow.checkpoints.folders import delete_checkpoint, list_manifests, newest_valid
from shufflenet_mlflow.checkpoints.manifest import update_manifest
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.writing import write_checkpoint


class CheckpointStore(Protocol):
    """Keeps checkpoints."""

    def save(
        self,
        state: Mapping[str, Any],
        iters: int,
        tag: str,
        *,
        val_top1: float | None,
    ) -> Path:
        """Keep a copy of `state`, which may be written later, and return the file's path.

        Raises:
            CheckpointError: an earlier one could not be kept.
        """

    def mark_best(self, checkpoint: Path, val_top1: float) -> bool:
        """Mark a checkpoint that is kept already as the best; return whether that was possible.

        Its file is not written again, since the run's `checkpoint.latest` may name it. A checkpoint that another store
        kept cannot be marked.
        """

    def newest(self) -> Path | None:
        """Wait until everything is on the disk, or has failed; return the newest checkpoint that is there."""

    def finish(self) -> Path | None:
        """Wait until everything is on the disk; return the newest checkpoint, or None if there is none.

        Raises:
            CheckpointError: something could not be kept.
        """


class MetricSink(Protocol):
    """Keeps metric points."""

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """Keep points at step `iters`."""


class FolderStore:
    """Keeps checkpoints in a folder; see `CheckpointStore`.

    Args:
        directory: made with the first checkpoint.
        retention: which of them to keep; by default all.
    """

    def __init__(self, directory: str | Path, retention: Retention = Retention()) -> None:  # noqa: B008 - immutable
        self.directory, self.retention = Path(directory), retention

    def save(self, state: Mapping[str, Any], iters: int, tag: str, *, val_top1: float | None) -> Path:
        """Write a checkpoint, and delete those that need not be kept.

        Raises:
            CheckpointError: it cannot be written; earlier ones are intact.
        """
        path = write_checkpoint(state, iters, tag, val_top1=val_top1, directory=self.directory).path
        for manifest in self.retention.drop(list_manifests(self.directory)):
            delete_checkpoint(self.directory / manifest.file_name)
        return path

    def mark_best(self, checkpoint: Path, val_top1: float) -> bool:
        """Write the accuracy into the checkpoint's manifest."""
        return update_manifest(checkpoint, val_top1=val_top1) is not None

    def newest(self) -> Path | None:
        """Return the newest checkpoint that verifies.

        Raises:
            UnresolvedError: there are some, and none verifies.
        """
        found = newest_valid(self.directory)
        return None if found is None else found.path

    def finish(self) -> Path | None:
        """Return the newest checkpoint that verifies; see `newest`."""
        return self.newest()


class NoStore:
    """Keeps no checkpoints, as in the processes of a distributed job that do not write."""

    def save(self, _state: Mapping[str, Any], iters: int, tag: str, *, val_top1: float | None) -> Path:
        """Return a name under which nothing is kept."""
        return Path(f"{tag}{iters}")

    def mark_best(self, _checkpoint: Path, _val_top1: float) -> bool:
        """Return True: the leader's answer counts."""
        return True

    def newest(self) -> Path | None:
        """Return None."""
        return None

    def finish(self) -> Path | None:
        """Return None."""
        return None


class NoMetrics:
    """Keeps no metrics, as in the processes of a distributed job that do not track."""

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """Do nothing: the leader logs them."""
