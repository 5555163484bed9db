"""Logged models of exported files: MLflow's `onnx` flavour, and images in, labels out, as for a checkpoint."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.export.exported import ExportedFile
from shufflenet_mlflow.export.logged import save_classifier, upload_model
from shufflenet_mlflow.runtime.versions import installed_versions
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.names import DEPLOY_SECTION, DEPLOY_TAG, EXPORT_SHA256_TAG, MODEL_VERSION_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run


def log_exported(client: "MlflowClient", run: "Run", manifest: CheckpointManifest, exported: ExportedFile) -> str:
    """Make a logged model of an ONNX file, or find it by the file's SHA-256.

    Args:
        manifest: the checkpoint's.

    Returns:
        Its ID.

    Raises:
        ExportError: MLflow has no flavour for the format.
        TrackingError: MLflow did not answer; the next call continues the unfinished model.
    """
    if exported.form != "onnx":
        raise ExportError(
            f"{str(exported.path)!r} is {exported.form}, which MLflow does not register; promote an .onnx, or the "
            "checkpoint itself",
            code="promote-format",
        )
    doing = f"make a logged model of {exported.path.name}"
    with mlflow_errors(doing):
        models = client.search_logged_models(
            [run.info.experiment_id],
            f"source_run_id = '{run.info.run_id}' AND tags.`{EXPORT_SHA256_TAG}` = '{exported.sha256}'",
        )
        ready = [model for model in models if str(model.status) == "READY"]
        if ready:
            return str(ready[0].model_id)
        model = models[0] if models else _create(client, run, manifest, exported)

    def write(folder: Path) -> None:
        save_onnx_model(exported, folder, run_id=run.info.run_id, model=model, metadata=manifest.to_dict())

    upload_model(client, model, write, doing)
    return str(model.model_id)


def _create(client: "MlflowClient", run: "Run", manifest: CheckpointManifest, exported: ExportedFile) -> "LoggedModel":
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(
        run.info.experiment_id,
        name=f"{exported.settings['network']}-{exported.kind}-{manifest.iters}".translate(
            str.maketrans("/:.%\"'", "------")
        ),
        source_run_id=run.info.run_id,
        tags={EXPORT_SHA256_TAG: exported.sha256, MODEL_VERSION_TAG: manifest.to_json()},
        params={"network": str(exported.settings["network"]), "format": exported.kind, "iters": str(manifest.iters)},
        model_type="image classifier",
    )
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, manifest.iters)])
    return model


def save_onnx_model(exported: ExportedFile, folder: Path, **identity: Any) -> None:
    """Write an ONNX file as an MLflow model into the new folder `folder`; `mlflow.onnx` loads it, too.

    Args:
        identity: as for `save_classifier`.
    """
    versions = installed_versions(("onnx",))
    flavor = {
        "onnx_version": versions.get("onnx", ""),
        "data": f"artifacts/{exported.path.name}",
        "providers": ["CPUExecutionProvider"],
        "onnx_session_options": None,
        "code": None,
    }
    settings = {key: value for key, value in exported.settings.items() if key != "origin"}
    save_classifier(
        exported.path, settings, folder, requirements=("onnx", "onnxruntime"), flavors={"onnx": flavor}, **identity
    )


def version_tags(run: "Run", exported: ExportedFile) -> dict[str, str]:
    """Return the tags of a registered version: file, size, and what the run knows of its accuracy and latency."""
    tags = {
        EXPORT_SHA256_TAG: exported.sha256,
        "export.file": exported.path.name,
        "export.format": exported.kind,
        "export.bytes": str(exported.bytes),
    }
    try:
        evaluated = json.loads(run.data.tags.get(f"{DEPLOY_TAG}{exported.kind}", "{}"))
    except ValueError:
        evaluated = {}
    if isinstance(evaluated, dict) and evaluated.get("sha256") == exported.sha256:
        tags |= {f"export.{key}": str(evaluated[key]) for key in ("top1", "data", "digest") if key in evaluated}
    section = f"{DEPLOY_SECTION}{exported.kind}/"
    for name, value in run.data.metrics.items():
        if name.startswith(f"{section}latency") and run.data.metrics.get(f"{section}bytes") == exported.bytes:
            tags[f"export.{name.removeprefix(section)}"] = f"{value:.4g}"
    return tags
