"""Logged models: a checkpoint that MLflow loads, serves and registers, without this package.

Its code is `classifier.py`, its weights are an exported program, so that loading it unpickles nothing. A logged model
belongs to one checkpoint of a run, and is created once: it is found by the checkpoint's SHA-256.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import local_name, short_name
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.data import decode, formats, reading, resize, rgb
from shufflenet_mlflow.errors import RefusedError, ShuffleNetError, TrackingError
from shufflenet_mlflow.evaluation import ranking
from shufflenet_mlflow.export import requests, serving
from shufflenet_mlflow.export.bundle import bundle
from shufflenet_mlflow.export.files import SETTINGS_FILE, load_pt2, write_pt2
from shufflenet_mlflow.export.program import Export, Exporter, check_equal, export_program, settings_of
from shufflenet_mlflow.export.quiet import quiet
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from shufflenet_mlflow.runtime.versions import installed_versions
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.lifecycle import require_active
from shufflenet_mlflow.tracking.names import MODEL_SHA256_TAG, MODEL_VERSION_TAG, VALIDATION_CONTEXT
from shufflenet_mlflow.tracking.paths import file_uri
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag
from shufflenet_mlflow.tracking.trust import check_artifact_address
from shufflenet_mlflow.tracking.uris import is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

CODE_FILE = "classifier.py"
"""The code of a logged model: `export.serving` and the modules it works with, in one file."""


_REQUIREMENTS = ("mlflow", "torch", "numpy", "opencv-python-headless", "pillow", "simplejpeg", "pandas")
_OPTIONAL_REQUIREMENTS = ("pillow-heif",)
"""Requirements of the code that a logged model can do without."""

_NOISY_LOGGERS = ("mlflow.pyfunc", "mlflow.models", "mlflow.types", "mlflow.utils")
"""Loggers that warn of MLflow's own type hints, and of requirements that are as they should be."""

_LINKED = ("loss", "val/loss", "val/top1", "val/top5", "val/mean_class_accuracy", "val/majority")
"""Metrics of a run that also belong to the checkpoint at their step."""


@dataclass(frozen=True)
class LogModels:
    """Make logged models of the run's best and its final checkpoint."""

    kind: ClassVar[str] = "models"

    def send(self, target: RunTarget) -> None:
        """Make those that do not exist yet.

        Raises:
            RefusedError: a checkpoint is missing or cannot be exported, or the server does not support logged models.
            DeletedError: the run, or its experiment, was deleted.
            TrackingError: MLflow did not answer.
        """
        run = target.read()
        require_active(target.client, run)
        named = (manifest_in_tag(run.data.tags, tag) for tag in (BEST_TAG, LATEST_TAG))
        export = Exporter()
        for manifest in dict.fromkeys(manifest for manifest in named if manifest is not None):
            try:
                if find_logged_model(target.client, run, manifest) is None:
                    with _local_copy(target, manifest) as path:
                        log_model(target.client, run, manifest, path, export)
            except Exception as error:  # whatever the exporter raises, later entries must not wait for ever
                if isinstance(error, TrackingError) and not (error.answered or error.mlflow_code == "HTTP_404"):
                    raise
                reason = str(error) if isinstance(error, ShuffleNetError) else f"{type(error).__name__}: {error}"
                raise RefusedError(
                    f"no logged model of {manifest.file_name}: {reason}", code="logged-model-refused"
                ) from error


@contextlib.contextmanager
def _local_copy(target: RunTarget, manifest: CheckpointManifest) -> Iterator[Path]:
    """Yield the checkpoint's file: the one in the run's folder, or else a downloaded one."""
    path = target.directory / local_name(manifest.file_name)
    recorded = read_manifest(path)
    is_other = recorded is not None and recorded.sha256 != manifest.sha256  # of another attempt
    with tempfile.TemporaryDirectory() as scratch:
        if is_other or not path.exists():
            path = target.artifacts.download(manifest.path, Path(scratch))
        verify_checkpoint(path, manifest)
        yield path


def find_logged_model(client: "MlflowClient", run: "Run", manifest: CheckpointManifest) -> "LoggedModel | None":
    """Return the logged model of a checkpoint; None if there is none.

    Raises:
        TrackingError: MLflow did not answer.
    """
    ready = [model for model in _models_of(client, run, manifest) if str(model.status) == "READY"]
    return ready[0] if ready else None


def _models_of(client: "MlflowClient", run: "Run", manifest: CheckpointManifest) -> "Sequence[LoggedModel]":
    with mlflow_errors(f"look for logged models of run {run.info.run_id}"):
        models: Sequence[LoggedModel] = client.search_logged_models(
            [run.info.experiment_id],
            f"source_run_id = '{run.info.run_id}' AND tags.`{MODEL_SHA256_TAG}` = '{manifest.sha256}'",
        )
    return models


def log_model(
    client: "MlflowClient", run: "Run", manifest: CheckpointManifest, path: Path, export: Export = export_program
) -> str:
    """Make a logged model of a checkpoint, with its metrics; return an existing one.

    Args:
        path: the checkpoint's file, verified.
        export: makes the program.

    Returns:
        Its ID.

    Raises:
        CheckpointError, ConfigError: the checkpoint's network cannot be built.
        ExportError: its program differs from it.
        TrackingError: MLflow did not answer; the next call continues the unfinished model.
    """
    models = _models_of(client, run, manifest)
    for model in models:
        if str(model.status) == "READY":
            return str(model.model_id)
    network = model_from_payload(read_checkpoint(path), repr(str(path)))
    doing = f"make a logged model of {manifest.file_name}"
    with mlflow_errors(doing):
        # A killed process, or a failing server, has left an unfinished one.
        model = models[0] if models else _create_model(client, run, manifest, network)
        _link(client, run, model.model_id, manifest)

    def write(folder: Path) -> None:
        write_model(network, folder, run_id=run.info.run_id, model=model, metadata=manifest.to_dict(), export=export)

    upload_model(client, model, write, doing)
    return str(model.model_id)


def upload_model(client: "MlflowClient", model: "LoggedModel", write: Callable[[Path], object], doing: str) -> None:
    """Write the files of a logged model and upload them; only then is it READY.

    Args:
        write: writes them into a new folder.
        doing: what to say of it in errors.

    Raises:
        TrackingError: MLflow did not answer; the next call continues the unfinished model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            write(folder)
        except Exception:
            with contextlib.suppress(Exception):  # the error of writing is the one to report
                client.finalize_logged_model(model.model_id, "FAILED")
            raise
        check_artifact_address(model.artifact_location, model.model_id, client.tracking_uri)
        with mlflow_errors(doing):
            client.log_model_artifacts(model.model_id, str(folder))
            _check_arrived(client, model.model_id, folder)
            client.finalize_logged_model(model.model_id, "READY")  # last: an unfinished model is written again


def _check_arrived(client: "MlflowClient", model_id: str, folder: Path) -> None:
    """Compare the files of a logged model with those of `folder`; see `RunArtifacts.check_arrived`.

    Raises:
        TrackingError: one is not there, or not whole.
    """
    if not is_server(client.tracking_uri):
        return
    for parent in {path.parent for path in folder.rglob("*") if path.is_file()}:
        inside = parent.relative_to(folder).as_posix()
        listed = client.list_logged_model_artifacts(model_id, None if inside == "." else inside)
        sizes = {entry.path.rpartition("/")[2]: entry.file_size for entry in listed}
        for path in parent.iterdir():
            if path.is_file() and sizes.get(path.name, -1) not in (None, path.stat().st_size):
                raise TrackingError(
                    f"{path.relative_to(folder)} did not arrive in the logged model {model_id}",
                    code="logged-model-not-arrived",
                )


def _create_model(
    client: "MlflowClient", run: "Run", manifest: CheckpointManifest, network: LoadedModel
) -> "LoggedModel":
    return client.create_logged_model(
        run.info.experiment_id,
        name=_name(network, manifest),
        source_run_id=run.info.run_id,
        tags={MODEL_SHA256_TAG: manifest.sha256, MODEL_VERSION_TAG: manifest.to_json()},
        params={
            "network": network.spec.name,
            "num_classes": str(network.num_classes),
            "input_size": str(network.preprocess.input_size),
            "iters": str(manifest.iters),
        },
        model_type="image classifier",
    )


def _name(network: LoadedModel, manifest: CheckpointManifest) -> str:
    """Return a name without the slashes, colons, dots, percent signs and quotes that MLflow refuses."""
    return f"{network.spec.name}-{short_name(manifest.file_name)}".translate(str.maketrans("/:.%\"'", "------"))


def write_model(
    network: LoadedModel,
    folder: Path,
    *,
    run_id: str | None = None,
    model: "LoggedModel | None" = None,
    metadata: dict[str, Any] | None = None,
    export: Export = export_program,
) -> float:
    """Write the network as an MLflow model into the new folder `folder`, for `mlflow models serve -m` too.

    Returns:
        Its difference from the network; see `check_equal`.

    Raises:
        ExportError: the program differs from the network.
        MlflowException: MLflow refuses it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "network.pt2"
        write_pt2(network, program, export=export)
        difference = check_equal(network, load_pt2(program), "the logged model")
        save_classifier(program, settings_of(network), folder, run_id=run_id, model=model, metadata=metadata)
    return difference


def save_classifier(
    program: Path,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    run_id: str | None = None,
    model: "LoggedModel | None" = None,
    metadata: dict[str, Any] | None = None,
    requirements: Sequence[str] = (),
    flavors: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write an exported program as an MLflow model of images into the new folder `folder`.

    Args:
        program: a `.pt2` or an `.onnx`.
        settings: labels and preprocessing; see `settings_of`.
        requirements: further packages that it needs.
        flavors: other forms in which MLflow loads the files, by name.

    Raises:
        MlflowException: MLflow refuses it.
    """
    import pandas as pd

    with quiet(*_NOISY_LOGGERS):
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, DataType, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "probability")]),
    )
    identity: dict[str, Any] = {"run_id": run_id}
    if model is not None:
        identity |= {"model_id": model.model_id, "model_uuid": model.model_id, "artifact_path": model.artifact_location}
    with tempfile.TemporaryDirectory() as scratch:
        settings_path = Path(scratch) / SETTINGS_FILE
        settings_path.write_text(json.dumps(settings, indent=2), "utf-8")
        code = Path(scratch) / CODE_FILE
        code.write_text(bundle([formats, resize, reading, rgb, decode, ranking, requests, serving]), "utf-8")
        with quiet(*_NOISY_LOGGERS):
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(code),
                artifacts={serving.PROGRAM: file_uri(program), serving.SETTINGS: file_uri(settings_path)},
                signature=signature,
                input_example=pd.DataFrame({"image": [_example_image()]}),
                pip_requirements=_requirements(*requirements),
                mlflow_model=Model(metadata=metadata, flavors=dict(flavors or {}), **identity),
            )


def _example_image() -> bytes:
    """Return a PNG of a few pixels."""
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _requirements(*more: str) -> list[str]:
    """Return what `classifier.py` needs, in the versions that are installed; without suffixes of local builds."""
    versions = installed_versions((*_REQUIREMENTS, *more, *_OPTIONAL_REQUIREMENTS))
    return [
        f"{package}=={versions[package].partition('+')[0]}" if package in versions else package
        for package in (*_REQUIREMENTS, *more, *(package for package in _OPTIONAL_REQUIREMENTS if package in versions))
    ]


def _link(client: "MlflowClient", run: "Run", model_id: str, manifest: CheckpointManifest) -> None:
    """Link the model to the run as an output, and the run's metrics at its step to the model."""
    from mlflow.entities import LoggedModelOutput, Metric

    run_id = run.info.run_id
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    if model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, manifest.iters)])
    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    validation = [entry.dataset for entry in inputs if any(tag.value == VALIDATION_CONTEXT for tag in entry.tags)]
    metrics = []
    for name in _LINKED:
        if name not in run.data.metrics:
            continue
        points = [point for point in client.get_metric_history(run_id, name) if point.step == manifest.iters]
        dataset = validation[0] if validation and name.startswith("val/") else None
        metrics += [
            # The same point again, now linked to the model; the run keeps it once.
            Metric(
                name,
                point.value,
                point.timestamp,
                point.step,
                model_id=model_id,
                run_id=run_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.digest if dataset else None,
            )
            for point in points[-1:]
        ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
