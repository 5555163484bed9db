"""Logged models: a checkpoint that MLflow loads, serves and registers, without this package.

Its code is `classifier.py`, its weights are an exported program, so that loading it unpickles nothing. A logged model
belongs to one checkpoint of a run, and is created once: it is found by the checkpoint's SHA-256.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest
from shufflenet_mlflow.checkpoints.names import short_name
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.data import decode
from shufflenet_mlflow.errors import RefusedError, ShuffleNetError, TrackingError
from shufflenet_mlflow.evaluation import ranking
from shufflenet_mlflow.export import serving
from shufflenet_mlflow.export.bundle import bundle
from shufflenet_mlflow.export.files import SETTINGS_FILE, load_pt2, write_pt2
from shufflenet_mlflow.export.program import check_equal, settings_of
from shufflenet_mlflow.export.quiet import quiet
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from shufflenet_mlflow.runtime.versions import installed_versions
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.names import MODEL_SHA256_TAG, MODEL_VERSION_TAG, VALIDATION_CONTEXT
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

CODE_FILE = "classifier.py"
"""The code of a logged model: `export.serving` and the modules it works with, in one file."""


_REQUIREMENTS = ("mlflow", "torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "simplejpeg", "pandas")

_NOISY_LOGGERS = ("mlflow.pyfunc", "mlflow.models", "mlflow.types", "mlflow.utils")
"""Loggers that warn of MLflow's own type hints, and of requirements that are as they should be."""

_LINKED = ("loss", "val/loss", "val/top1", "val/top5")
"""Metrics of a run that also belong to the checkpoint at their step."""


@dataclass(frozen=True)
class LogModels:
    """Make logged models of the run's best and its final checkpoint."""

    kind: ClassVar[str] = "models"

    def send(self, target: RunTarget) -> None:
        """Make those that do not exist yet.

        Raises:
            RefusedError: a checkpoint is missing or cannot be exported, or the server does not support logged models.
            TrackingError: MLflow did not answer, or the run was deleted, which can be undone.
        """
        run = target.read()
        if run.info.lifecycle_stage != "active":
            raise TrackingError(
                f"run {target.run_id} was deleted; `mlflow runs restore` brings it back",
                code="logged-model-run-deleted",
            )
        named = (manifest_in_tag(run.data.tags, tag) for tag in (BEST_TAG, LATEST_TAG))
        for manifest in dict.fromkeys(manifest for manifest in named if manifest is not None):
            try:
                if find_logged_model(target.client, run, manifest) is None:
                    with _local_copy(target, manifest) as path:
                        log_model(target.client, run, manifest, path)
            except Exception as error:  # whatever the exporter raises, later entries must not wait for ever
                if isinstance(error, TrackingError) and not error.answered:
                    raise
                reason = str(error) if isinstance(error, ShuffleNetError) else f"{type(error).__name__}: {error}"
                raise RefusedError(
                    f"no logged model of {manifest.file_name}: {reason}", code="logged-model-refused"
                ) from error


@contextlib.contextmanager
def _local_copy(target: RunTarget, manifest: CheckpointManifest) -> Iterator[Path]:
    """Yield the checkpoint's file: the one in the run's folder, or else a downloaded one."""
    path = target.directory / manifest.file_name
    with tempfile.TemporaryDirectory() as scratch:
        if not path.exists():
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


def log_model(client: "MlflowClient", run: "Run", manifest: CheckpointManifest, path: Path) -> str:
    """Make a logged model of a checkpoint, with its metrics; return an existing one.

    Args:
        path: the checkpoint's file, verified.

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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            write_model(network, folder, run_id=run.info.run_id, model=model, metadata=asdict(manifest))
        except Exception:
            with contextlib.suppress(Exception):  # the error of writing is the one to report
                client.finalize_logged_model(model.model_id, "FAILED")
            raise
        with mlflow_errors(doing):
            client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")  # last: an unfinished model is written again
    return str(model.model_id)


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
) -> float:
    """Write the network as an MLflow model into the new folder `folder`, for `mlflow models serve -m` too.

    Returns:
        Its difference from the network; see `check_equal`.

    Raises:
        ExportError: the program differs from the network.
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
        program, settings = Path(scratch) / "network.pt2", Path(scratch) / SETTINGS_FILE
        write_pt2(network, program)
        difference = check_equal(network, load_pt2(program), "the logged model")
        settings.write_text(json.dumps(settings_of(network), indent=2), "utf-8")
        code = Path(scratch) / CODE_FILE
        code.write_text(bundle([decode, ranking, serving]), "utf-8")
        with quiet(*_NOISY_LOGGERS):
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(code),
                artifacts={serving.PROGRAM: str(program), serving.SETTINGS: str(settings)},
                signature=signature,
                input_example=pd.DataFrame({"image": [_example_image()]}),
                pip_requirements=_requirements(),
                mlflow_model=Model(metadata=metadata, **identity),
            )
    return difference


def _example_image() -> bytes:
    """Return a PNG of a few pixels."""
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _requirements() -> list[str]:
    """Return what `classifier.py` needs, in the versions that are installed; without suffixes of local builds."""
    versions = installed_versions(_REQUIREMENTS)
    return [
        f"{package}=={versions[package].partition('+')[0]}" if package in versions else package
        for package in _REQUIREMENTS
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
