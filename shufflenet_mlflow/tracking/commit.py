"""Bring a checkpoint to its run: upload, confirm, write the manifest, then commit by moving the tags."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import newest_first
from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError, RefusedError
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.messages import MetricPoints, now_ms, send_points
from shufflenet_mlflow.tracking.target import JustWritten, RunTarget, is_trusted, manifest_in_tag


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with its manifest: the artifacts, the metrics `epoch` and `loss`, then the tags.

    The tags are set last: they are the commit, and never name a missing file. `checkpoint.latest` never moves
    to an earlier iteration, `checkpoint.best` never to a lower accuracy.
    """

    kind: ClassVar[str] = "checkpoint"
    record: Mapping[str, Any]
    timestamp: int
    again: bool = False
    """The run may already have the file."""
    unless_passed: bool = False
    """Skip it if the run's latest checkpoint is newer: the run had this one, and it was pruned."""

    @classmethod
    def of(cls, manifest: CheckpointManifest, *, again: bool = False, unless_passed: bool = False) -> "Checkpoint":
        """Return the message for a checkpoint on the disk."""
        return cls(asdict(manifest), now_ms(), again, unless_passed)

    def send(self, target: RunTarget) -> None:
        """Upload and confirm the file, write its manifest, then commit."""
        manifest = CheckpointManifest(**self.record)
        artifacts, name = target.artifacts, manifest.file_name
        was_pruned = self.again and not (target.directory / name).exists()
        if self.unless_passed or was_pruned:
            latest = manifest_in_tag(target.read().data.tags, LATEST_TAG)
            if latest is not None and newest_first({latest.file_name, name})[0] == latest.file_name:
                return
        uploaded = artifacts.manifest_of(name) if self.again else None
        if uploaded is None or uploaded.sha256 != manifest.sha256:
            path = target.directory / name
            if not _is_current(path, manifest, target.just_written):
                return
            with mlflow_errors(f"upload the checkpoint {name}"):
                artifacts.upload(path, manifest)
        if uploaded != manifest:
            with mlflow_errors(f"upload the manifest of {name}"):
                artifacts.write_manifest(manifest)
        values = {"epoch": manifest.epoch, "loss": manifest.loss}
        points = {key: float(value) for key, value in values.items() if value is not None}
        tags = self._pointers(target, manifest)
        send_points(target, [MetricPoints(points, manifest.iters, self.timestamp)], tags)

    def _pointers(self, target: RunTarget, manifest: CheckpointManifest) -> dict[str, str]:
        """Return the tags that name this checkpoint from now on."""
        tags = target.read().data.tags
        latest, best = manifest_in_tag(tags, LATEST_TAG), manifest_in_tag(tags, BEST_TAG)
        moved = {}
        if is_better(manifest, best):
            moved[BEST_TAG] = manifest.to_json()
        if latest != manifest and (latest is None or latest.iters <= manifest.iters):
            moved[LATEST_TAG] = manifest.to_json()
        return moved


def _is_current(path: Path, manifest: CheckpointManifest, just_written: JustWritten) -> bool:
    """Whether the file matches its manifest; False if a later checkpoint has taken its name.

    Raises:
        RefusedError: it is damaged or missing.
    """
    if is_trusted(manifest, just_written) and path.exists():
        return True
    try:
        verify_checkpoint(path, manifest)
    except CheckpointError as error:
        current = read_manifest(path)
        if current is not None and current.sha256 != manifest.sha256:
            return False  # written again, and the new file has an entry of its own
        raise RefusedError(
            f"the checkpoint cannot be sent to the run: {error}", code="checkpoint-not-sendable"
        ) from error
    return True


def is_better(manifest: CheckpointManifest, best: CheckpointManifest | None) -> bool:
    """Whether `checkpoint.best` moves to `manifest`."""
    if best is not None and best.path == manifest.path:
        return best != manifest
    if manifest.val_top1 is None:
        return False
    return best is None or best.val_top1 is None or manifest.val_top1 > best.val_top1
