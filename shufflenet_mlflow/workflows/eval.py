"""`shufflenet eval`: a checkpoint and an image folder in, accuracies out, also in MLflow."""

import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.references import parse_reference
from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE, check_types
from shufflenet_mlflow.data.datasets import data_name, list_folder
from shufflenet_mlflow.data.folder import require_same_classes
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImageLog, default_workers, worker_deaths_reported
from shufflenet_mlflow.errors import ConfigError, DataError, TrackingError, UnresolvedError
from shufflenet_mlflow.evaluation.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.evaluation.report import Observer, Report
from shufflenet_mlflow.models.loaded import LoadedModel, label_outputs
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, keep_freed_memory, move_model
from shufflenet_mlflow.runtime.launchers import ended_with_mlflow_run
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.run import WrapperRun, take_mlflow_run_id
from shufflenet_mlflow.tracking.run_ids import read_run
from shufflenet_mlflow.workflows.eval_results import Evaluated, record_in_new, record_in_own, record_in_source
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint, ModelRequest

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import Run


@dataclass(frozen=True)
class EvalRequest(ModelRequest):
    """A checkpoint to evaluate, and the images; None means the checkpoint's own setting."""

    val_dir: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    on_bad_image: str = "fail"
    log_to: str | None = None
    """`source`, the run that the checkpoint belongs to; `new`, a run of its own; or `none`. By default the run that
    `mlflow run` created, or else `source` if `ref` names a run or a registered model."""
    experiment: str | None = None
    run_name: str | None = None


@dataclass(frozen=True)
class EvalSummary:
    """The result of an evaluation, and the checkpoint."""

    result: EvalResult
    report: Report
    checkpoint: Path
    run_id: str | None
    """The run that the checkpoint belongs to."""
    iters: int
    model: str
    images_per_second: float
    logged_to: str | None = None
    """The run that has the result."""
    problem: TrackingError | None = None
    """Error that kept the result from being logged."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `eval --json`."""
        return {
            "top1": self.result.top1,
            "top5": self.result.top5,
            "loss": self.result.loss,
            "n": self.result.n,
            "skipped": self.result.skipped,
            "mean_class_accuracy": self.report.mean_class_accuracy,
            "calibration_error": self.report.calibration_error(),
            "images_per_second": self.images_per_second,
            "classes": {row.name: row.accuracy for row in self.report.class_rows()},
            "checkpoint": str(self.checkpoint),
            "run_id": self.run_id,
            "iters": self.iters,
            "model": self.model,
            "logged_to": self.logged_to,
        }

    def metrics(self) -> dict[str, float]:
        """Return the metrics that are logged, by plain name."""
        return {
            "top1": self.result.top1,
            "top5": self.result.top5,
            "loss": self.result.loss,
            "mean_class_accuracy": self.report.mean_class_accuracy,
            "calibration_error": self.report.calibration_error(),
            "images_per_second": self.images_per_second,
        }


def run_evaluation(request: EvalRequest, *, reporter: Reporter, stop: StopFlag) -> EvalSummary:
    """Evaluate a checkpoint on an image folder, and log the result where `request.log_to` says.

    If the store is away when the result is logged, the result is returned all the same: see `EvalSummary.problem`.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
    """
    prepare_environment()
    with ended_with_mlflow_run():
        return _run(request, JobContext.alone(reporter, stop))


def _run(request: EvalRequest, context: JobContext) -> EvalSummary:
    mlflow_run_id = take_mlflow_run_id()
    where = request.log_to or _default_place(request.ref, mlflow_run_id)
    store = Connection(request.tracking_uri)
    client = store.client if mlflow_run_id is not None or where != "none" else None
    made = WrapperRun(client, mlflow_run_id, tags={}) if client is not None and mlflow_run_id is not None else None
    with made or nullcontext():
        loaded = request.load(store, context.reporter)
        source = _source(store, loaded, where) if client is not None and where != "none" else None
        val_dir = _val_dir(request, loaded)
        summary, listing = _evaluate(request, loaded, val_dir, context)
        if client is None or where == "none":
            return summary
        evaluated = Evaluated(
            network=summary.model,
            checkpoint=summary.checkpoint.name,
            iters=summary.iters,
            run_id=summary.run_id,
            name=data_name(val_dir),
            listing=listing,
            metrics=summary.metrics(),
            report=summary.report,
        )
        if where == "new" and made is not None:
            try:
                record_in_own(made, source, evaluated)
            except TrackingError as error:
                made.status = "FAILED"
                return replace(summary, problem=error)
            return replace(summary, logged_to=mlflow_run_id)
        try:
            if where == "new":
                run_id = record_in_new(client, source, evaluated, experiment=request.experiment, name=request.run_name)
            else:
                assert source is not None  # noqa: S101 - `_source` saw to that
                run_id = record_in_source(client, source, evaluated)
        except TrackingError as error:
            return replace(summary, problem=error)
        return replace(summary, logged_to=run_id)


def _default_place(ref: str, mlflow_run_id: str | None) -> str:
    """Return `new` below `mlflow run`, `source` if a run was named, else `none`."""
    if mlflow_run_id is not None:
        return "new"
    return "none" if isinstance(parse_reference(ref), Path) else "source"


def _source(store: Connection, loaded: LoadedCheckpoint, where: str) -> "Run | None":
    """Return the run that the checkpoint belongs to; None if there is none in this store.

    Raises:
        UnresolvedError: there is none, and the result was to be logged there.
        TrackingError: MLflow did not answer.
    """
    run = None
    if loaded.run_id is not None:
        with suppress(UnresolvedError):  # it is in another store
            run = read_run(store, loaded.run_id)
    if run is None and where == "source":
        raise UnresolvedError(
            f"{loaded.source} belongs to no run in {redact(store.uri)}; --log-to new makes one for the "
            "result, --log-to none leaves MLflow out",
            code="checkpoint-without-run",
        )
    return run


def _usable_config(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's configuration; empty if it is missing or invalid, which evaluation does not need."""
    config = dict(payload.get("config", {}))
    try:
        check_types(config)
    except ConfigError:
        return {}
    usable = config.get("batch_size", 1) >= 1 and config.get("workers", 0) >= 0
    return config if usable else {}


def _val_dir(request: EvalRequest, loaded: LoadedCheckpoint) -> str | None:
    """Return the folder of the images to evaluate on; None for the bundled digits.

    Raises:
        ConfigError: neither the user nor the checkpoint says.
    """
    trained = _usable_config(loaded.payload)
    val_dir: str | None = request.val_dir if request.val_dir is not None else trained.get("val_dir")
    if val_dir is None and "val_dir" not in trained:
        raise ConfigError(
            f"--val-dir is missing: {loaded.source} does not say which images it was validated on",
            code="val-dir-missing",
        )
    return val_dir


def _evaluate(
    request: EvalRequest, loaded: LoadedCheckpoint, val_dir: str | None, context: JobContext
) -> tuple[EvalSummary, ImageListing]:
    network, source = loaded.network, loaded.source
    trained = _usable_config(loaded.payload)
    skip_bad = request.on_bad_image == "skip"
    listing = list_folder(val_dir, "val", option="--val-dir", skip_bad=skip_bad, cache_dir=request.cache_dir)
    _check_classes(network, listing, source, context.reporter)
    device = choose_device(request.device)
    keep_freed_memory(device)
    batch_size = request.batch_size or trained.get("batch_size", DEFAULT_BATCH_SIZE)
    workers = default_workers(len(listing), batch_size, network.preprocess.input_size)
    if val_dir is None:  # the digits, where they would be of no use
        workers = 0
    settings = EvalSettings(
        batch_size=batch_size, workers=workers if request.workers is None else request.workers, device=device
    )
    observer = Observer(listing)
    began = time.perf_counter()
    with worker_deaths_reported():
        result = evaluate(
            move_model(network.module, device),
            listing,
            network.preprocess,
            settings,
            bad_images=BadImageLog(skip=skip_bad),
            context=context,
            observe=observer,
        )
    seconds = time.perf_counter() - began
    labels = label_outputs(dict(enumerate(listing.classes)), network.num_classes)
    summary = EvalSummary(
        result=result,
        report=Report(observer.outcomes(), tuple(labels)),
        checkpoint=loaded.path,
        run_id=loaded.run_id,
        iters=loaded.iters,
        model=network.spec.name,
        images_per_second=result.n / seconds,
    )
    return summary, listing


def _check_classes(network: LoadedModel, listing: ImageListing, source: str, reporter: Reporter) -> None:
    """Refuse a folder whose classes are not the network's; report it if the checkpoint does not name its classes.

    Raises:
        DataError: the names differ, or there are more of them than the network tells apart.
    """
    if network.class_to_idx is not None:
        require_same_classes(network.class_to_idx, listing, expected_in=source, option="--val-dir")
    if len(listing.classes) > network.num_classes:
        raise DataError(
            f"--val-dir {str(listing.root)!r} has {len(listing.classes)} classes, {source} tells "
            f"{network.num_classes} apart; --val-dir names another folder",
            code="too-many-classes",
        )
    if network.class_to_idx is None:
        last = len(listing.classes) - 1
        text = (
            f"{source} does not name its classes: {listing.classes[0]!r} … {listing.classes[-1]!r} are taken for "
            f"0 … {last} of its {network.num_classes}"
        )
        if last + 1 == network.num_classes:
            reporter.note(text)
        else:
            reporter.warn(f"{text}; if these are other classes, the accuracies below mean nothing")
