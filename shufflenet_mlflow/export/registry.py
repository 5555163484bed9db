"""Promoting: a run's checkpoint becomes a version of a registered model, with aliases."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoint import CheckpointRecord
from shufflenet_mlflow.client import mlflow_errors
from shufflenet_mlflow.errors import CheckpointError, TrackingError
from shufflenet_mlflow.resolve.remote import MODEL_VERSION_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Promoted:
    """A version of a registered model, and the checkpoint that it stands for."""

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
        """A reference to it."""
        return f"models:/{self.name}@{self.aliases[0]}" if self.aliases else f"models:/{self.name}/{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """The document of `checkpoints promote --json`."""
        return {**asdict(self), "aliases": list(self.aliases), "uri": self.uri}


def promote(
    client: "MlflowClient", record: CheckpointRecord, *, run_id: str, model_id: str, name: str, aliases: Sequence[str]
) -> Promoted:
    """Register the logged model of a checkpoint as a version of `name`, or find that version, and set the aliases.

    Raises:
        TrackingError: MLflow refused, or did not answer.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_errors(f"register the model {name!r}"):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [
            version
            for version in client.search_model_versions(f"name = '{_quoted(name)}'")
            if version.run_id == run_id and _stands_for(version.tags.get(MODEL_VERSION_TAG, ""), record)
        ]
        version = (
            known[0]
            if known
            else client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=run_id,
                model_id=model_id,
                tags={MODEL_VERSION_TAG: record.to_json()},
                description=_description(record, run_id),
            )
        )
    for alias in aliases:
        with mlflow_errors(f"set the alias {alias!r} of {name}"):
            client.set_registered_model_alias(name, alias, version.version)
    return Promoted(
        name,
        str(version.version),
        tuple(aliases),
        model_id,
        run_id,
        record.file_name,
        record.iters,
        record.val_top1,
    )


def _stands_for(tag: str, record: CheckpointRecord) -> bool:
    try:
        return CheckpointRecord.from_json(tag).sha256 == record.sha256
    except CheckpointError:
        return False


def _quoted(name: str) -> str:
    if "'" in name:
        raise TrackingError(f"a registered model cannot be called {name!r}: leave the quote out", "BAD_REQUEST")
    return name


def _description(record: CheckpointRecord, run_id: str) -> str:
    accuracy = "" if record.val_top1 is None else f", validation accuracy {record.val_top1:.4f}"
    return f"{record.file_name} of run {run_id}: iteration {record.iters}{accuracy}"
