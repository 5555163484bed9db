"""Delete the checkpoints that a retention policy drops, in a run and on the disk.

In two phases: first the run's tag `checkpoint.deleting` names them, and they are no longer resolved; then files and
manifests are deleted, and the tag is cleared. The next pruning completes an interrupted one.
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from shufflenet_mlflow.checkpoints.folders import delete_checkpoint, list_manifests
from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import local_name, newest_first
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError, UnreadableCheckpointError
from shufflenet_mlflow.tracking.artifacts import being_deleted
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.commit import pending_checkpoints
from shufflenet_mlflow.tracking.journal_file import read_pending
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
            **self.manifest.to_dict(),
            "file": self.manifest.file_name,
            "on_disk": self.on_disk,
            "in_run": self.in_run,
        }


def pending_names(directory: Path) -> set[str]:
    """Return the names of the checkpoints in `directory` whose upload is pending."""
    return {manifest.file_name for manifest in pending_checkpoints(read_pending(directory).entries)}


def choose_dropped(
    directory: Path | None,
    retention: Retention,
    *,
    target: RunTarget | None,
    waiting: Collection[str] = (),
) -> list[Dropped]:
    """Return the checkpoints of a folder and its run that `retention` drops, oldest first; then superseded attempts.

    An attempt at an iteration is superseded by a later one; `retention` sees the last one only. Always kept: the newest
    one that verifies, the best, promoted ones, those whose upload is pending, and files without a manifest of this
    project.

    Args:
        target: the run; None for a folder that has none.
        waiting: names of checkpoints whose upload is pending.

    Raises:
        TrackingError: MLflow did not answer.
    """
    if not retention.is_set and (target is None or not target.artifacts.has_attempts()):
        return []
    local = {manifest.file_name: manifest for manifest in (list_manifests(directory) if directory else [])}
    in_run: list[CheckpointManifest] = []
    named: set[str] = set()
    if target is not None:
        in_run = target.artifacts.manifests()
        tags = target.read().data.tags
        tagged = (manifest_in_tag(tags, LATEST_TAG), manifest_in_tag(tags, BEST_TAG))
        named = {manifest.file_name for manifest in tagged if manifest is not None}
        named |= promoted_names(target.client, target.run_id)
    last: dict[str, CheckpointManifest] = {}  # by the name on the disk
    superseded = []
    for manifest in in_run:  # the last attempt comes first
        if last.setdefault(local_name(manifest.file_name), manifest) is not manifest:
            superseded.append(manifest)
    remote = {name: manifest.as_local() for name, manifest in last.items()}
    protected = {*waiting, *(name for name, manifest in last.items() if manifest.file_name in named)}
    just_written = target.just_written if target is not None else {}
    protected |= _newest_valid_name(directory, local, remote, just_written)
    dropped = retention.drop(list({**local, **remote}.values()), protected)
    return [
        *(
            Dropped(last.get(manifest.file_name, manifest), on_disk=on_disk, in_run=manifest.file_name in remote)
            for manifest in dropped
            if (on_disk := _is_ours(directory, manifest, local, remote, target)) or manifest.file_name in remote
        ),
        *(
            Dropped(manifest, on_disk=False, in_run=True)
            for manifest in reversed(superseded)
            if manifest.file_name not in named and local_name(manifest.file_name) not in waiting
        ),
    ]


def _newest_valid_name(
    directory: Path | None,
    local: dict[str, CheckpointManifest],
    remote: dict[str, CheckpointManifest],
    just_written: JustWritten,
) -> set[str]:
    """Return the name of the newest checkpoint that verifies; it is kept whatever the rules say.

    Newer ones that cannot be read are kept too: they may be intact.
    """
    unreadable: set[str] = set()
    for name in newest_first({**local, **remote}):
        if directory is None or name not in local or is_trusted(local[name], just_written):
            return {name, *unreadable}
        try:
            verify_checkpoint(directory / name, local[name])
        except UnreadableCheckpointError as error:
            logger.warning("kept: %s", error)
            unreadable.add(name)
            continue
        except CheckpointError as error:
            logger.warning("the newest checkpoint does not count: %s", error)
            continue
        return {name, *unreadable}
    return unreadable


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
    kept = _named_or_pending(target, target.read().data.tags)
    for name in target.artifacts.half_uploads():
        if not kept(name):
            target.artifacts.delete(name)
    return dropped


def _named_or_pending(target: RunTarget, tags: Mapping[str, str]) -> Callable[[str], bool]:
    """Return a function that says of a name in the run whether a tag has it, or an upload of it is pending."""
    tagged = (manifest_in_tag(tags, LATEST_TAG), manifest_in_tag(tags, BEST_TAG))
    named = {manifest.file_name for manifest in tagged if manifest is not None}
    pending = pending_names(target.directory)
    return lambda name: name in named or local_name(name) in pending


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
            _delete_on_disk(directory / local_name(item.manifest.file_name))


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
    if DELETING_TAG not in tags:
        return
    kept = _named_or_pending(target, tags)  # a rewound run may have written it again
    names = [name for name in being_deleted(tags) if not kept(name)]
    manifests = {name: target.artifacts.manifest_of(name) for name in names}
    _delete_in_run(target, names)
    for name, manifest in manifests.items():
        path = target.directory / local_name(name)
        local = read_manifest(path)
        if manifest is not None and local is not None and local.sha256 == manifest.sha256:
            _delete_on_disk(path)


@dataclass(frozen=True)
class Prune:
    """Delete the checkpoints that `Retention` drops, in the run and on the disk, and attempts that were superseded."""

    kind: ClassVar[str] = "prune"
    keep_last: int | None
    keep_best: int | None
    keep_every: int | None

    def send(self, target: RunTarget) -> None:
        prune_run(target, Retention(self.keep_last, self.keep_best, self.keep_every))
