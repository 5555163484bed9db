"""Choose the name under which a checkpoint goes to its run, so that no name ever carries other bytes."""

from dataclasses import dataclass

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest
from shufflenet_mlflow.checkpoints.names import attempt_name, attempt_prefix, local_name, newest_first, parse_name
from shufflenet_mlflow.tracking.artifacts import being_deleted
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag


@dataclass(frozen=True)
class Placement:
    """The name of a checkpoint among the artifacts of its run, and what is there already."""

    manifest: CheckpointManifest
    """With the name in the run."""
    has_file: bool
    """The run has the file, whole and with a manifest."""
    stored: CheckpointManifest | None
    """The manifest that the run has under this name."""


def find_placement(target: RunTarget, manifest: CheckpointManifest) -> Placement:
    """Return where a checkpoint lies in the run, or where to put it.

    The plain name is taken while no artifact, manifest or tag has it. What has these very bytes is taken again, and so
    is a file without a manifest that nothing names: half an upload. Anything else gets the next attempt's name.

    Raises:
        TrackingError: MLflow did not answer.
    """
    artifacts, plain = target.artifacts, local_name(manifest.file_name)
    sizes = artifacts.sizes()
    tags = target.read().data.tags
    in_tags = [found for tag in (LATEST_TAG, BEST_TAG) if (found := manifest_in_tag(tags, tag)) is not None]
    named = {*(found.file_name for found in in_tags), *being_deleted(tags)}
    listed = {name.removesuffix(".json") for name in sizes}
    attempts = [name for name in newest_first(listed | named) if local_name(name) == plain]
    uncommitted = []
    for name in attempts:
        stored = artifacts.manifest_of(name) if f"{name}.json" in sizes else None
        known = [stored, *(found for found in in_tags if found.file_name == name)]
        if any(found is not None and found.sha256 == manifest.sha256 for found in known):
            is_whole = name in sizes and sizes[name] in (None, manifest.bytes)
            return Placement(manifest.named(name), stored is not None and is_whole, stored)
        if f"{name}.json" not in sizes and name not in named:
            uncommitted.append(name)
    if not attempts or attempts == uncommitted == [plain]:
        return Placement(manifest.named(plain), has_file=False, stored=None)
    last = max(parsed.attempt for name in attempts if (parsed := parse_name(name)) is not None)
    begun = [name for name in uncommitted if attempt_prefix(name).endswith(f"-{manifest.sha256[:12]}~")]
    name = begun[0] if begun else attempt_name(plain, last + 1, manifest.sha256)
    return Placement(manifest.named(name), has_file=False, stored=None)
