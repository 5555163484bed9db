"""Promote a run's checkpoint to a version of a registered model, with aliases."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.errors import CheckpointError, TrackingError
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import mlflow_errors, used_by_mlflow
from shufflenet_mlflow.tracking.names import MODEL_VERSION_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Promoted:
    """A version of a registered model, and its checkpoint."""

    name: str
    version: str
    aliases: tuple[str, ...]
    model_id: str
    run_id: str
    checkpoint: str
    """File name."""
    iters: int
    val_top1: float | None

    @property
    def uri(self) -> str:
        """Reference to the version."""
        return f"models:/{self.name}@{self.aliases[0]}" if self.aliases else f"models:/{self.name}/{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `checkpoints promote --json`."""
        return {**asdict(self), "aliases": list(self.aliases), "uri": self.uri}


def promote(
    client: "MlflowClient",
    manifest: CheckpointManifest,
    *,
    run_id: str,
    model_id: str,
    name: str,
    aliases: Sequence[str],
    tags: Mapping[str, str] | None = None,
) -> Promoted:
    """Register the logged model of a checkpoint as a version of `name`, or find that version, and set the aliases.

    Args:
        tags: of the version, besides the checkpoint's manifest.

    Raises:
        TrackingError: MLflow refused, or did not answer.
    """
    with used_by_mlflow(client.tracking_uri), mlflow_errors(f"register the model {name!r}"):
        version = _find_version(client, name, model_id, manifest) or client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags={MODEL_VERSION_TAG: manifest.to_json()},
            description=_description(manifest, run_id),
        )
    for key, value in (tags or {}).items():
        with mlflow_errors(f"set the tag {key!r} of {name}"):
            client.set_model_version_tag(name, version.version, key, value)
    for alias in aliases:
        with mlflow_errors(f"set the alias {alias!r} of {name}"):
            client.set_registered_model_alias(name, alias, version.version)
    return Promoted(
        name,
        str(version.version),
        tuple(aliases),
        model_id,
        run_id,
        manifest.file_name,
        manifest.iters,
        manifest.val_top1,
    )


def _find_version(
    client: "MlflowClient", name: str, model_id: str, manifest: CheckpointManifest
) -> "ModelVersion | None":
    """Return the version that was made from this checkpoint, creating the registered model if necessary."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        tag = version.tags.get(MODEL_VERSION_TAG, "")
        if str(version.source) == f"models:/{model_id}" and _is_manifest_of(tag, manifest):
            return version
    return None


def _is_manifest_of(tag: str, manifest: CheckpointManifest) -> bool:
    try:
        return CheckpointManifest.from_json(tag).sha256 == manifest.sha256
    except CheckpointError:
        return False


def _description(manifest: CheckpointManifest, run_id: str) -> str:
    accuracy = "" if manifest.val_top1 is None else f", validation accuracy {manifest.val_top1:.4f}"
    return f"{manifest.file_name} of run {run_id}: iteration {manifest.iters}{accuracy}"


def checkpoint_in_run(client: "MlflowClient", run_id: str, name: str, sha256: str) -> CheckpointManifest:
    """Return the manifest of a checkpoint among the run's artifacts.

    Args:
        name: its name on the disk or in the run.
        sha256: of several attempts, the one with these bytes is taken; without such, the last.

    Raises:
        TrackingError: there is no such artifact, or MLflow did not answer.
    """
    artifacts = RunArtifacts(client, run_id)
    manifest = artifacts.find(name, sha256) or artifacts.find(name, None)
    if manifest is None:
        raise TrackingError(
            f"run {run_id} has no checkpoint {name} yet; `shufflenet sync FOLDER` uploads it",
            "RESOURCE_DOES_NOT_EXIST",
            code="checkpoint-not-in-run",
        )
    return manifest
