"""`shufflenet export` and `checkpoints promote`: exported files, and versions of registered models."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.manifest import read_manifest
from shufflenet_mlflow.errors import ExportError, UnresolvedError
from shufflenet_mlflow.export import Promoted, export_file, log_model, promote
from shufflenet_mlflow.export.logged import find_logged_model, write_model
from shufflenet_mlflow.export.program import TOLERANCE
from shufflenet_mlflow.export.registry import checkpoint_in_run
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import mlflow_errors, prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.resolve import resolve, run_of
from shufflenet_mlflow.tracking.run_ids import read_run
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint, ModelRequest, source_of
from shufflenet_mlflow.workflows.options import check_request

MLFLOW_FORMAT = "mlflow"
"""A folder for `mlflow models serve -m`."""


@dataclass(frozen=True)
class ExportRequest(ModelRequest):
    """A checkpoint to export; None means the checkpoint's own setting."""

    format: str = "pt2"
    output: Path | None = None


@dataclass(frozen=True)
class ExportSummary:
    """An exported file."""

    path: Path
    format: str
    loaded: LoadedCheckpoint
    difference: float
    """Largest difference between logits of the export and of the checkpoint, as a fraction of the largest logit."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `export --json`."""
        return {
            "path": str(self.path),
            "format": self.format,
            "model": self.loaded.network.spec.name,
            "classes": self.loaded.network.labels,
            "checkpoint": str(self.loaded.path),
            "run_id": self.loaded.run_id,
            "iters": self.loaded.iters,
            "largest_difference": self.difference,
            "tolerance": TOLERANCE,
        }


def run_export(request: ExportRequest, *, reporter: Reporter) -> ExportSummary:
    """Write a checkpoint's network in another format, and compare the two before renaming the file.

    Raises:
        ExportError: it cannot be written, or differs.
        ShuffleNetError: as `ModelRequest.load` does.
    """
    prepare_environment()
    loaded = request.load(Connection(request.tracking_uri), reporter)
    suffix = "-mlflow" if request.format == MLFLOW_FORMAT else f".{request.format}"
    target = request.output or Path(loaded.path.name.removesuffix(".pth.tar") + suffix)
    if not target.parent.is_dir():
        raise ExportError(
            f"cannot write {str(target)!r}: its folder does not exist; create it, or change --output",
            code="output-folder-missing",
        )
    if target.is_dir() and request.format != MLFLOW_FORMAT:
        raise ExportError(f"{str(target)!r} is a folder; --output names a file", code="output-is-folder")
    if request.format != MLFLOW_FORMAT:
        return ExportSummary(target, request.format, loaded, export_file(loaded.network, target, request.format))
    if target.exists():
        raise ExportError(f"{str(target)!r} exists already; --output names another folder", code="output-exists")
    difference = 0.0
    try:
        with mlflow_errors(f"write the model {str(target)!r}"):
            difference = write_model(loaded.network, target, run_id=loaded.run_id)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return ExportSummary(target, request.format, loaded, difference)


def run_promotion(
    ref: str,
    *,
    name: str,
    aliases: Sequence[str],
    tracking_uri: str | None,
    cache_dir: Path | None,
    reporter: Reporter,
) -> Promoted:
    """Register a checkpoint as a version of the model `name`, to be served and resolved by its alias.

    Its logged model is created if there is none yet.

    Raises:
        ConfigError: MLflow does not accept the name or an alias.
        UnresolvedError: there is no such checkpoint, or it belongs to no run.
        TrackingError: MLflow refused, or did not answer.
    """
    prepare_environment()
    check_request({"ref": ref, "name": name, "aliases": aliases, "tracking_uri": tracking_uri})
    store = Connection(tracking_uri)
    resolved = resolve(ref, tracking_uri=store, cache_dir=cache_dir, reporter=reporter)
    run_id = resolved.run_id or run_of(resolved.checkpoint)
    if run_id is None:
        raise UnresolvedError(
            f"{source_of(resolved.path)} belongs to no run, and only a run's checkpoint can be promoted; "
            f"`shufflenet export {ref} --format mlflow`, with --model if it names none, exports a model that MLflow "
            "serves",
            code="promote-without-run",
        )
    client, run = store.client, read_run(store, run_id)
    manifest = checkpoint_in_run(client, run_id, resolved.path.name)
    local = read_manifest(resolved.path)
    if local is not None and local.sha256 != manifest.sha256:
        raise UnresolvedError(
            f"{source_of(resolved.path)} is not the one that run {run_id} has under that name; "
            f"promote runs:/{run_id}@{manifest.iters} instead",
            code="promote-other-file",
        )
    model = find_logged_model(client, run, manifest)
    if model is None:
        reporter.note(f"making a logged model of {manifest.file_name}")
    model_id = model.model_id if model is not None else log_model(client, run, manifest, resolved.path)
    return promote(client, manifest, run_id=run_id, model_id=model_id, name=name, aliases=aliases)
