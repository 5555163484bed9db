"""`shufflenet export` and `checkpoints promote`: exported files, and versions of registered models."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.manifest import read_manifest
from shufflenet_mlflow.checkpoints.references import is_exported
from shufflenet_mlflow.config import option
from shufflenet_mlflow.data.calibration import CALIBRATION_IMAGES
from shufflenet_mlflow.errors import ConfigError, ExportError, UnresolvedError
from shufflenet_mlflow.export import INT8_FORMATS, SUFFIXES, Promoted, export_file, log_model, promote
from shufflenet_mlflow.export.exported import open_exported
from shufflenet_mlflow.export.exported_model import log_exported, version_tags
from shufflenet_mlflow.export.int8 import Calibration
from shufflenet_mlflow.export.logged import find_logged_model, write_model
from shufflenet_mlflow.export.program import TOLERANCE
from shufflenet_mlflow.export.registry import checkpoint_in_run
from shufflenet_mlflow.export.weights import sha256_of_export, size_of_export
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.models.spec import SPEC_ARGUMENTS
from shufflenet_mlflow.runtime.files import sha256_of
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import mlflow_errors, prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.lifecycle import require_active
from shufflenet_mlflow.tracking.resolve import resolve, run_of
from shufflenet_mlflow.tracking.run_ids import read_run
from shufflenet_mlflow.workflows.bench_deploy import write_bench_script
from shufflenet_mlflow.workflows.calibration import calibration_of
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint, ModelRequest, source_of
from shufflenet_mlflow.workflows.options import check_request

MLFLOW_FORMAT = "mlflow"
"""A folder for `mlflow models serve -m`."""
WARN_BELOW = 0.99
"""Share of equal labels below which quantisation is warned of."""


@dataclass(frozen=True)
class ExportRequest(ModelRequest):
    """A checkpoint to export; None means the checkpoint's own setting."""

    format: str = "pt2"
    output: Path | None = None
    int8: bool = False
    """Quantise to int8, statically, with weights per channel."""
    calibration_dir: str | None = None
    """Folder or table of images to quantise with; None for the run's training images."""
    calibration_images: int | None = None
    """How many of them; None for `CALIBRATION_IMAGES`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8 and self.format not in INT8_FORMATS:
            raise ConfigError(
                f"--int8 is for --format {' and '.join(INT8_FORMATS)}, not {self.format}", code="int8-format"
            )
        for name in ("calibration_dir", "calibration_images"):
            if getattr(self, name) is not None and not self.int8:
                raise ConfigError(f"{option(name)} is for --int8, which is missing", code="calibration-without-int8")


@dataclass(frozen=True)
class ExportSummary:
    """An exported file."""

    path: Path
    format: str
    loaded: LoadedCheckpoint
    difference: float
    """Largest difference between logits of the export and of the checkpoint, as a fraction of the largest logit."""
    calibration: Calibration | None = None
    """Images that it was quantised with."""
    equal_labels: float | None = None
    """Share of those images with the checkpoint's label, in 0..1."""

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
            "tolerance": None if self.calibration is not None else TOLERANCE,
            "int8": self.calibration is not None,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "equal_labels": self.equal_labels,
            "bytes": None if self.format == MLFLOW_FORMAT else size_of_export(self.path),
            "sha256": None if self.format == MLFLOW_FORMAT else sha256_of_export(self.path),
        }


def run_export(request: ExportRequest, *, reporter: Reporter) -> ExportSummary:
    """Write a checkpoint's network in another format, and compare the two before renaming the file.

    Raises:
        ExportError: it cannot be written, or differs.
        ShuffleNetError: as `ModelRequest.load` does.
    """
    prepare_environment()
    if is_exported(request.ref):
        raise ExportError(f"{request.ref!r} is an export already; name its checkpoint", code="export-of-export")
    loaded = request.load(Connection(request.tracking_uri), reporter)
    if loaded.network.spec.fake_quantized and request.format in INT8_FORMATS and not request.int8:
        raise ConfigError(
            f"--int8 is missing: {loaded.source} was trained with --qat, and computes as int8 does", code="int8-missing"
        )
    target = request.output or Path(loaded.path.name.removesuffix(".pth.tar") + _suffix(request))
    if not target.parent.is_dir():
        raise ExportError(
            f"cannot write {str(target)!r}: its folder does not exist; create it, or change --output",
            code="output-folder-missing",
        )
    if target.is_dir() and request.format != MLFLOW_FORMAT:
        raise ExportError(f"{str(target)!r} is a folder; --output names a file", code="output-is-folder")
    _check_suffix(request, target)
    if request.format != MLFLOW_FORMAT:
        return _export_file(request, loaded, target, reporter)
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


def _suffix(request: ExportRequest) -> str:
    if request.format == MLFLOW_FORMAT:
        return "-mlflow"
    return ".int8" * request.int8 + SUFFIXES[request.format]


def _check_suffix(request: ExportRequest, target: Path) -> None:
    """Raise ExportError for a file whose name does not say its format, or is that of a file of another kind."""
    suffix = SUFFIXES.get(request.format, "")
    if target.suffix.lower() != suffix and suffix:
        raise ExportError(
            f"--output (={target}) must end in {suffix}, by which `eval`, `compare` and others know the format",
            code="output-suffix",
        )


def _export_file(request: ExportRequest, loaded: LoadedCheckpoint, target: Path, reporter: Reporter) -> ExportSummary:
    number = request.calibration_images or CALIBRATION_IMAGES
    calibration = None
    if request.int8:
        calibration = calibration_of(
            loaded, request.calibration_dir, number, cache_dir=request.cache_dir, reporter=reporter
        )
    exported = export_file(loaded.network, target, request.format, origin=_origin_of(loaded), calibration=calibration)
    write_bench_script(target.parent)
    if exported.equal_labels is not None and exported.equal_labels < WARN_BELOW:
        reporter.warn(
            f"int8 changes the label of {1 - exported.equal_labels:.1%} of the images that it was compared on; "
            "`shufflenet eval` and `shufflenet compare` of the file say what that costs"
        )
    return ExportSummary(target, request.format, loaded, exported.difference, calibration, exported.equal_labels)


def _origin_of(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Return what an exported file says of its checkpoint: no paths of this machine."""
    network, spec = loaded.network, loaded.network.spec
    size = network.preprocess.input_size
    given = {name: value for name in SPEC_ARGUMENTS if (value := getattr(spec, name)) is not None}
    return {
        "run_id": loaded.run_id,
        "checkpoint": loaded.path.name,
        "checkpoint_sha256": _sha256_at(loaded.path),
        "iters": loaded.iters,
        "class_to_idx": None if network.class_to_idx is None else dict(network.class_to_idx),
        "macs": model_cost(spec.name, network.num_classes, size, **given, **spec.arguments).macs,
    }


def _sha256_at(path: Path) -> str:
    recorded = read_manifest(path)
    if recorded is not None:
        return recorded.sha256
    with open(path, "rb") as file:
        return sha256_of(file)


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
        DeletedError: the run, or its experiment, was deleted.
        TrackingError: MLflow refused, or did not answer.
    """
    prepare_environment()
    check_request({"ref": ref, "name": name, "aliases": aliases, "tracking_uri": tracking_uri})
    store = Connection(tracking_uri)
    if is_exported(ref):
        return _promote_exported(ref, store, name, aliases, reporter)
    resolved = resolve(ref, tracking_uri=store, cache_dir=cache_dir, reporter=reporter, prefer_best=True)
    run_id = resolved.run_id or run_of(resolved.checkpoint)
    if run_id is None:
        raise UnresolvedError(
            f"{source_of(resolved.path)} belongs to no run, and only a run's checkpoint can be promoted; "
            f"`shufflenet export {ref} --format mlflow`, with --model if it names none, exports a model that MLflow "
            "serves",
            code="promote-without-run",
        )
    client, run = store.client, read_run(store, run_id)
    require_active(client, run)
    sha256 = _sha256_at(resolved.path)
    manifest = checkpoint_in_run(client, run_id, resolved.path.name, sha256)
    if sha256 != manifest.sha256:
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


def _promote_exported(ref: str, store: Connection, name: str, aliases: Sequence[str], reporter: Reporter) -> Promoted:
    exported, _ = open_exported(Path(ref))
    run_id, checkpoint = exported.text("run_id"), exported.text("checkpoint")
    if run_id is None or checkpoint is None:
        raise UnresolvedError(
            f"{ref!r} does not say which run it is from, and only exports of a run's checkpoint can be promoted",
            code="promote-export-without-run",
        )
    client, run = store.client, read_run(store, run_id)
    require_active(client, run)
    manifest = checkpoint_in_run(client, run_id, checkpoint, exported.text("checkpoint_sha256") or "")
    tags = version_tags(run, exported)
    if "export.top1" not in tags:
        reporter.note(f"{ref} was not evaluated: `shufflenet eval {ref} --val-dir DIR` first puts its accuracy there")
    model_id = log_exported(client, run, manifest, exported)
    return promote(client, manifest, run_id=run_id, model_id=model_id, name=name, aliases=aliases, tags=tags)
