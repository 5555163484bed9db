"""Bring a checkpoint to its run: upload, confirm, write the manifest, then commit by moving the tags.

A name that was committed never gets other bytes: `tracking.placement` chooses one.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import local_name, newest_first, parse_name
from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError, RefusedError
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.journal_file import Entry
from shufflenet_mlflow.tracking.messages import MetricPoints, now_ms, send_points
from shufflenet_mlflow.tracking.placement import find_placement
from shufflenet_mlflow.tracking.target import JustWritten, RunTarget, is_trusted, manifest_in_tag


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with its manifest: the artifacts, the metrics `epoch` and `loss`, then the tags.

    The tags are set last: they are the commit, and never name a missing file. `checkpoint.latest` never moves
    to an earlier iteration, `checkpoint.best` never to a worse one.
    """

    kind: ClassVar[str] = "checkpoint"
    record: Mapping[str, Any]
    timestamp: int
    again: bool = False
    """The run may already have the file."""
    unless_passed: bool = False
    """Skip it if the run's latest checkpoint is newer: the run had this one, and it was pruned."""
    metrics: Mapping[str, float] | None = None
    """Metrics of this checkpoint; None: `epoch` and `loss` of the manifest."""

    @classmethod
    def of(
        cls,
        manifest: CheckpointManifest,
        *,
        again: bool = False,
        unless_passed: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> "Checkpoint":
        """Return the message for a checkpoint on the disk."""
        return cls(manifest.to_dict(), now_ms(), again, unless_passed, metrics)

    def manifest(self) -> CheckpointManifest:
        """Return the checkpoint's manifest.

        Raises:
            RefusedError: the journal, which is a file like any other, holds something else.
        """
        try:
            manifest: CheckpointManifest | None = CheckpointManifest.from_json(json.dumps(self.record))
        except (CheckpointError, ValueError, TypeError):
            manifest = None
        if manifest is None or parse_name(manifest.file_name) is None:
            raise RefusedError(
                f"the journal's entry is not the manifest of a checkpoint: {str(self.record)[:80]}",
                code="journal-record",
            )
        return manifest

    def send(self, target: RunTarget) -> None:
        """Upload and confirm the file, write its manifest, then commit."""
        manifest = self.manifest()
        artifacts, name = target.artifacts, manifest.file_name
        was_pruned = self.again and not (target.directory / name).exists()
        if self.unless_passed or was_pruned:
            latest = manifest_in_tag(target.read().data.tags, LATEST_TAG)
            if latest is not None and _is_passed(name, latest):
                return
        placement = find_placement(target, manifest)
        committed = placement.manifest
        if not placement.has_file:
            path = target.directory / name
            if not _is_current(path, manifest, target.just_written):
                return
            with mlflow_errors(f"upload the checkpoint {name}"):
                artifacts.upload(path, committed)
        if placement.stored != committed:
            with mlflow_errors(f"upload the manifest of {name}"):
                artifacts.write_manifest(committed)
        values = {"epoch": manifest.epoch, "loss": manifest.loss} if self.metrics is None else self.metrics
        points = {key: float(value) for key, value in values.items() if value is not None}
        tags = self._pointers(target, committed)
        send_points(target, [MetricPoints(points, manifest.iters, self.timestamp)], tags)

    def _pointers(self, target: RunTarget, manifest: CheckpointManifest) -> dict[str, str]:
        """Return the tags that name this checkpoint from now on."""
        tags = target.read_to_commit().data.tags
        latest, best = manifest_in_tag(tags, LATEST_TAG), manifest_in_tag(tags, BEST_TAG)
        moved = {}
        if is_better(manifest, best):
            moved[BEST_TAG] = manifest.to_json()
        if latest != manifest and (latest is None or not _is_earlier(manifest, latest)):
            moved[LATEST_TAG] = manifest.to_json()
        return moved


def _is_earlier(manifest: CheckpointManifest, latest: CheckpointManifest) -> bool:
    """Whether a checkpoint is of an earlier iteration than the latest, or an earlier attempt at the same."""
    if manifest.as_local().path != latest.as_local().path:
        return manifest.iters < latest.iters
    return newest_first([manifest.file_name, latest.file_name])[0] != manifest.file_name


def _is_passed(name: str, latest: CheckpointManifest) -> bool:
    """Whether a run has gone past the checkpoint `name`, or has an attempt at it as its latest."""
    newest = local_name(latest.file_name)
    return newest_first({newest, name})[0] == newest


def pending_checkpoints(entries: Iterable[Entry]) -> list[CheckpointManifest]:
    """Return the checkpoints whose upload is among the pending entries of a journal."""
    found = []
    for entry in entries:
        if entry.kind == Checkpoint.kind:
            with contextlib.suppress(RefusedError, TypeError):  # sending it will say what is wrong with it
                found.append(Checkpoint(**entry.body).manifest())
    return found


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
    if best is not None and best.sha256 == manifest.sha256:
        return best != manifest
    if manifest.score is None:
        return False
    if best is not None and (best.monitor, best.mode) != (manifest.monitor, manifest.mode):
        return manifest.monitor is not None  # the script has begun to measure another way
    if best is None or best.score is None or manifest.score > best.score:
        return True
    is_repeated = best.as_local().path == manifest.as_local().path and not _is_earlier(manifest, best)
    return is_repeated and manifest.score == best.score  # the earlier attempt can go then
