"""`shufflenet eval`: a checkpoint and an image folder in, accuracies out, also in MLflow."""

import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import read_manifest
from shufflenet_mlflow.checkpoints.references import is_exported, parse_reference
from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE
from shufflenet_mlflow.data.folder import with_same_classes
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImageLog, default_workers
from shufflenet_mlflow.errors import DataError, TrackingError, UnresolvedError
from shufflenet_mlflow.evaluation.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.evaluation.report import Observer, Report
from shufflenet_mlflow.export.exported import ExportedFile
from shufflenet_mlflow.models.loaded import LoadedModel, label_outputs
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, keep_freed_memory, move_model
from shufflenet_mlflow.runtime.launchers import ended_with_launcher
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.abandoned import status_in_words, writer_state
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.images import training_digests
from shufflenet_mlflow.tracking.lifecycle import explained, read_experiment, require_active, require_active_experiment
from shufflenet_mlflow.tracking.messages import Tags
from shufflenet_mlflow.tracking.names import CONTINUES_TAG
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.run import WrapperRun, is_unplaced, take_mlflow_run_id, wanted_experiment
from shufflenet_mlflow.tracking.run_ids import read_run
from shufflenet_mlflow.workflows.eval_images import EvalImages, as_its_run, list_images_of
from shufflenet_mlflow.workflows.eval_results import Evaluated, record_in_new, record_in_own, record_in_source
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint, ModelRequest, usable_config

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient, Run

SHORT_ID = 12
"""Characters of a run's ID in a message."""


@dataclass(frozen=True)
class EvalRequest(ModelRequest):
    """A checkpoint to evaluate, and the images; None means the checkpoint's own setting."""

    val_dir: str | None = None
    split: str | None = None
    """`train`, `val` or `test`, of a table's column or as the run divided its images; None means validation images,
    or all, where nothing divides them."""
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    on_bad_image: str | None = None
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
    export: ExportedFile | None = None
    """The exported file in the place of a checkpoint."""
    data: str = ""
    """Name and digest of the images, and where they are."""

    @property
    def top1(self) -> float:
        """Accuracy, in 0..1."""
        return self.result.top1

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five most probable, in 0..1."""
        return self.result.top5

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.result.loss

    @property
    def n(self) -> int:
        """Number of images."""
        return self.result.n

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the classes' accuracies, in 0..1."""
        return self.report.mean_class_accuracy

    @property
    def majority(self) -> float:
        """Share of the largest class, in 0..1: the accuracy of always answering with it."""
        return self.result.majority

    @property
    def classes(self) -> dict[str, float | None]:
        """Class -> its accuracy, in 0..1; None for a class without images."""
        return {row.name: row.accuracy for row in self.report.class_rows()}

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `eval --json`."""
        return {
            "top1": self.result.top1,
            "top5": self.result.top5,
            "loss": self.result.loss,
            "n": self.result.n,
            "skipped": self.result.skipped,
            "mean_class_accuracy": self.report.mean_class_accuracy,
            "majority": self.result.majority,
            "calibration_error": self.report.calibration_error(),
            "images_per_second": self.images_per_second,
            "classes": self.classes,
            "checkpoint": str(self.checkpoint),
            "run_id": self.run_id,
            "iters": self.iters,
            "model": self.model,
            "logged_to": self.logged_to,
            "export": None if self.export is None else self.export.to_dict(),
        }

    def metrics(self) -> dict[str, float]:
        """Return the metrics that are logged, by plain name."""
        return {
            "top1": self.result.top1,
            "top5": self.result.top5,
            "loss": self.result.loss,
            "mean_class_accuracy": self.report.mean_class_accuracy,
            "majority": self.result.majority,
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
    with ended_with_launcher(stop):
        return _run(request, JobContext.alone(reporter, stop))


def _run(request: EvalRequest, context: JobContext) -> EvalSummary:
    mlflow_run_id = take_mlflow_run_id()
    where = request.log_to or _default_place(request.ref, mlflow_run_id)
    store = Connection(request.tracking_uri)
    client = store.client if mlflow_run_id is not None or where != "none" else None
    made = WrapperRun(client, mlflow_run_id, tags={}) if client is not None and mlflow_run_id is not None else None
    with made or nullcontext():
        loaded = request.load(store, context.reporter)
        source, where = _place(store, request, loaded, where, context.reporter)
        if client is not None and (made is None or where == "source"):
            _require_active_place(client, source, where, request.experiment)
        if source is not None and writer_state(source) in ("silent", "gone"):
            run_id = source.info.run_id
            context.reporter.note(f"run {run_id} is {status_in_words(source)}: `shufflenet runs mend {run_id}` ends it")
        images, summary = measure(request, as_its_run(loaded, source), context)
        digest = images.listing.content_digest[:SHORT_ID]
        summary = replace(summary, data=f"{images.names[0]}: {images.listing.source} (digest {digest})")
        if source is not None:
            _warn_of_training_images(store, source.info.run_id, images, context.reporter)
        if client is None or where == "none":
            return summary
        evaluated = Evaluated(
            network=summary.model,
            checkpoint=summary.checkpoint.name,
            iters=summary.iters,
            run_id=summary.run_id,
            names=images.names,
            listing=images.listing,
            metrics=summary.metrics(),
            report=summary.report,
            sha256=manifest.sha256 if (manifest := read_manifest(summary.checkpoint)) is not None else None,
            export=loaded.exported,
        )
        if where == "new" and made is not None and not is_unplaced(client, made.target.run_id):
            try:
                record_in_own(made, source, evaluated)
            except TrackingError as error:
                made.status = "FAILED"
                return replace(summary, problem=error)
            return replace(summary, logged_to=mlflow_run_id)
        try:
            if where == "new":
                run_id = record_in_new(client, source, evaluated, experiment=request.experiment, name=request.run_name)
                if made is not None:
                    made.send(Tags({CONTINUES_TAG: run_id}))
            else:
                assert source is not None  # noqa: S101 - `_source` saw to that
                run_id = record_in_source(client, source, evaluated)
        except TrackingError as error:
            if made is not None:
                made.status = "FAILED"
            if where == "source" and source is not None:
                error = explained(client, source.info.run_id, error)
            return replace(summary, problem=error)
        return replace(summary, logged_to=run_id)


def measure(request: EvalRequest, loaded: LoadedCheckpoint, context: JobContext) -> tuple[EvalImages, EvalSummary]:
    """Evaluate a checkpoint that has been loaded.

    Args:
        request: on which images, and how; its `ref` has been loaded.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
    """
    images = list_images_of(
        request.val_dir,
        request.split,
        loaded,
        usable_config(loaded.payload),
        skip_bad=_skip_bad(request, loaded),
        cache_dir=request.cache_dir,
        reporter=context.reporter,
    )
    option = "--val-dir" if request.val_dir is not None else "the run's folder"
    listing = _with_classes(loaded.network, images.listing, loaded.source, context.reporter, option=option)
    images = replace(images, listing=listing)
    return images, _evaluate(request, loaded, listing, context, is_digits=images.directory is None)


def measure_on(
    request: EvalRequest, loaded: LoadedCheckpoint, listing: ImageListing, context: JobContext, *, is_digits: bool
) -> EvalSummary:
    """Evaluate a checkpoint that has been loaded, on images that have been listed.

    Raises:
        DataError: they have other classes.
    """
    listing = _with_classes(loaded.network, listing, loaded.source, context.reporter)
    return _evaluate(request, loaded, listing, context, is_digits=is_digits)


def _default_place(ref: str, mlflow_run_id: str | None) -> str:
    """Return `new` below `mlflow run`, `source` if a run was named, else `none`."""
    if mlflow_run_id is not None:
        return "new"
    return "none" if isinstance(parse_reference(ref), Path) and not is_exported(ref) else "source"


def _place(
    store: Connection, request: EvalRequest, loaded: LoadedCheckpoint, where: str, reporter: Reporter
) -> tuple["Run | None", str]:
    """Return the run that the checkpoint belongs to, if it matters, and where to log.

    The result of an exported file goes to its run if that is in this store, unless the user wants it elsewhere; and
    unless the user names images, its run says which.

    Raises:
        UnresolvedError, TrackingError: as `_source`.
    """
    if where == "none" and (loaded.exported is None or request.val_dir is not None):
        return None, where
    try:
        return _source(store, loaded, where), where
    except UnresolvedError as error:
        if loaded.exported is None or request.log_to is not None:
            raise
        reporter.note(f"not logged: {error}")
        return None, "none"


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


def _require_active_place(client: "MlflowClient", source: "Run | None", where: str, experiment: str | None) -> None:
    """Refuse, before the work, to log to a deleted run or experiment.

    Raises:
        DeletedError: it was deleted.
        TrackingError: MLflow did not answer.
    """
    if where == "source" and source is not None:
        require_active(client, source)
    elif where == "new" and source is not None and experiment is None:
        require_active_experiment(client, read_experiment(client, source))
    elif where == "new":
        wanted_experiment(client, experiment)


def _skip_bad(request: EvalRequest, loaded: LoadedCheckpoint) -> bool:
    return (request.on_bad_image or usable_config(loaded.payload).get("on_bad_image")) == "skip"


def _evaluate(
    request: EvalRequest, loaded: LoadedCheckpoint, listing: ImageListing, context: JobContext, *, is_digits: bool
) -> EvalSummary:
    network = loaded.network
    trained = usable_config(loaded.payload)
    device = choose_device(loaded.device(request.device))
    keep_freed_memory(device)
    batch_size = request.batch_size or trained.get("batch_size", DEFAULT_BATCH_SIZE)
    workers = default_workers(len(listing), batch_size, network.preprocess.input_size)
    if is_digits:  # where they would be of no use
        workers = 0
    settings = EvalSettings(
        batch_size=batch_size, workers=workers if request.workers is None else request.workers, device=device
    )
    observer = Observer(listing)
    began = time.perf_counter()
    result = evaluate(
        move_model(network.module, device),
        listing,
        network.preprocess,
        settings,
        bad_images=BadImageLog(skip=_skip_bad(request, loaded)),
        context=context,
        observe=observer,
    )
    seconds = time.perf_counter() - began
    labels = label_outputs(dict(enumerate(listing.classes)), network.num_classes)
    if result.only_answer is not None:
        context.reporter.warn(f"every image is taken for {labels[result.only_answer]!r}")
    return EvalSummary(
        result=result,
        report=Report(observer.outcomes(), tuple(labels)),
        checkpoint=loaded.path,
        run_id=loaded.run_id,
        iters=loaded.iters,
        model=network.spec.name,
        images_per_second=result.n / seconds,
        export=loaded.exported,
    )


def _warn_of_training_images(store: Connection, run_id: str, images: EvalImages, reporter: Reporter) -> None:
    """Say how many of the images the run was trained on, as far as digests show it; all of its training images are."""
    listing = images.listing
    if images.part == "train" or not listing.is_small:
        return
    try:
        trained_on = training_digests(RunArtifacts(store.client, run_id))
    except TrackingError as error:
        reporter.warn(f"{error}; whether the images were trained on is not known")
        return
    known = sum(digest in trained_on for digest in listing.image_digests)
    others = "" if images.part is not None else f" --against {run_id[:SHORT_ID]}"  # a folder that holds both
    if known:
        reporter.warn(
            f"{known:,} of {counted(len(listing), 'image')} in {str(listing.source)!r} "
            f"{'is' if known == 1 else 'are'} among the training images of the run, so its accuracy on them is too "
            f"high; `shufflenet data check DIR{others}` names them"
        )


def _with_classes(
    network: LoadedModel, listing: ImageListing, source: str, reporter: Reporter, *, option: str = "--val-dir"
) -> ImageListing:
    """Return the listing with the network's labels; report it if the checkpoint does not name its classes.

    Raises:
        DataError: the names differ, or there are more of them than the network tells apart.
    """
    if network.class_to_idx is not None:
        way_out = "--val-dir names a folder with these classes"
        listing = with_same_classes(network.class_to_idx, listing, expected_in=source, option=option, way_out=way_out)
    if len(listing.classes) > network.num_classes:
        raise DataError(
            f"{option} {str(listing.source)!r} has {counted(len(listing.classes), 'class', 'classes')}, {source} "
            f"tells {network.num_classes} apart; --val-dir names another folder",
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
    return listing
