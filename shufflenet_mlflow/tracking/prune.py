"""Delete the checkpoints that a retention policy drops, in a run and on the disk.

In two phases: first the run's tag `checkpoint.deleting` names them, and they are no longer resolved; then files and
manifests are deleted, and the tag is cleared. The next pruning completes an interrupted one.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from shufflenet_mlflow.checkpoints.folders import delete_checkpoint, list_manifests
from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import newest_first
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.tracking.artifacts import being_deleted
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.journal import read_pending
from shufflenet_mlflow.tracking.names import DELETING_TAG
from shufflenet_mlflow.tracking.remote_checkpoints import promoted_names
from shufflenet_mlflow.tracking.target import JustWritten, RunTarget, is_trusted, manifest_in_tag

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dropped:
    """A checkpoint that the policy drops."""

    manifest: CheckpointManifest
    on_disk: bool
    in_run: bool

    def to_dict(self) -> dict[str, Any]:
        """Return one entry of `checkpoints prune --json`."""
        return {
            **asdict(self.manifest),
            "file": self.manifest.file_name,
            "on_disk": self.on_disk,
            "in_run": self.in_run,
        }


def pending_names(directory: Path) -> set[str]:
    """Return the names of the checkpoints in `directory` whose upload is pending."""
    return {
        str(entry.body["record"]["path"]).rpartition("/")[2]
        for entry in read_pending(directory).entries
        if entry.kind == Checkpoint.kind
    }


def choose_dropped(
    directory: Path | None,
    retention: Retention,
    *,
    target: RunTarget | None,
    waiting: Collection[str] = (),
) -> list[Dropped]:
    """Return the checkpoints of a folder and its run that `retention` drops, oldest first.

    Always kept: the newest one that verifies, the best, promoted ones, those whose upload is pending, and files
    without a manifest of this project.

    Args:
        target: the run; None for a folder that has none.
        waiting: names of checkpoints whose upload is pending.

    Raises:
        TrackingError: MLflow did not answer.
    """
    local = {manifest.file_name: manifest for manifest in (list_manifests(directory) if directory else [])}
    remote: dict[str, CheckpointManifest] = {}
    protected = set(waiting)
    if target is not None:
        remote = {manifest.file_name: manifest for manifest in target.artifacts.manifests()}
        tags = target.read().data.tags
        named = (manifest_in_tag(tags, LATEST_TAG), manifest_in_tag(tags, BEST_TAG))
        protected |= {manifest.file_name for manifest in named if manifest is not None}
        protected |= promoted_names(target.client, target.run_id)
    just_written = target.just_written if target is not None else {}
    protected |= _newest_valid_name(directory, local, remote, just_written)
    dropped = retention.drop(list({**local, **remote}.values()), protected)
    return [
        Dropped(manifest, on_disk=on_disk, in_run=manifest.file_name in remote)
        for manifest in dropped
        if (on_disk := _is_ours(directory, manifest, local, remote, target)) or manifest.file_name in remote
    ]


def _newest_valid_name(
    directory: Path | None,
    local: dict[str, CheckpointManifest],
    remote: dict[str, CheckpointManifest],
    just_written: JustWritten,
) -> set[str]:
    """Return the name of the newest checkpoint that verifies; it is kept whatever the rules say."""
    for name in newest_first({**local, **remote}):
        if directory is None or name not in local or is_trusted(local[name], just_written):
            return {name}
        try:
            verify_checkpoint(directory / name, local[name])
        except CheckpointError as error:
            logger.warning("the newest checkpoint does not count: %s", error)
            continue
        return {name}
    return set()


def _is_ours(
    directory: Path | None,
    manifest: CheckpointManifest,
    local: dict[str, CheckpointManifest],
    remote: dict[str, CheckpointManifest],
    target: RunTarget | None,
) -> bool:
    """Whether the file on the disk is the run's own; nothing else in the folder is deleted."""
    name = manifest.file_name
    if directory is None or name not in local:
        return False
    if target is None:
        return True
    if name in remote:
        return remote[name].sha256 == local[name].sha256
    try:
        return bool(read_checkpoint(directory / name).get("run_id") == target.run_id)
    except CheckpointError:
        return False


def prune_run(target: RunTarget, retention: Retention) -> list[Dropped]:
    """Delete what `retention` drops, in the run and in its folder.

    Raises:
        TrackingError: MLflow did not answer; the next pruning deletes the rest.
    """
    _complete(target)
    dropped = choose_dropped(target.directory, retention, target=target, waiting=pending_names(target.directory))
    delete(dropped, target.directory, target)
    for name in target.artifacts.orphaned_manifests():
        target.artifacts.delete(name)
    return dropped


def delete(dropped: Collection[Dropped], directory: Path | None, target: RunTarget | None) -> None:
    """Delete checkpoints in two phases.

    Raises:
        TrackingError: MLflow did not answer.
    """
    names = [item.manifest.file_name for item in dropped if item.in_run]
    if target is not None and names:
        target.set_tag(DELETING_TAG, json.dumps(names))
        _delete_in_run(target, names)
    for item in dropped:
        if directory is not None and item.on_disk:
            _delete_on_disk(directory / item.manifest.file_name)


def _delete_on_disk(path: Path) -> None:
    try:
        delete_checkpoint(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("cannot delete %s: %s", path, error.strerror)


def _delete_in_run(target: RunTarget, names: Collection[str]) -> None:
    for name in names:
        target.artifacts.delete(name)
    with mlflow_errors(f"clear the tag {DELETING_TAG} of run {target.run_id}"):
        target.client.delete_tag(target.run_id, DELETING_TAG)


def _complete(target: RunTarget) -> None:
    """Finish an interrupted deletion."""
    tags = target.read().data.tags
    named = {
        manifest.file_name for tag in (LATEST_TAG, BEST_TAG) if (manifest := manifest_in_tag(tags, tag)) is not None
    }
    kept = named | pending_names(target.directory)  # a rewound run may have written it again
    names = [name for name in being_deleted(tags) if name not in kept]
    if DELETING_TAG not in tags:
        return
    manifests = {name: target.artifacts.manifest_of(name) for name in names}
    _delete_in_run(target, names)
    for name, manifest in manifests.items():
        local = read_manifest(target.directory / name)
        if manifest is not None and local is not None and local.sha256 == manifest.sha256:
            _delete_on_disk(target.directory / name)


@dataclass(frozen=True)
class Prune:
    """Delete the checkpoints that `Retention` drops, in the run and on the disk."""

    kind: ClassVar[str] = "prune"
    keep_last: int | None
    keep_best: int | None
    keep_every: int | None

    def send(self, target: RunTarget) -> None:
        prune_run(target, Retention(self.keep_last, self.keep_best, self.keep_every))
