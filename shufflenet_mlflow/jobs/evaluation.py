"""The evaluation job: a checkpoint reference and an image folder in, accuracies out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoint import is_own, read_checkpoint
from shufflenet_mlflow.client import connect, prepare_environment
from shufflenet_mlflow.config import check_types
from shufflenet_mlflow.data.folder import ImageListing, require_same_classes
from shufflenet_mlflow.data.loader import BadImageLog, worker_deaths_reported
from shufflenet_mlflow.errors import ConfigError, DataError
from shufflenet_mlflow.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.network import Architecture, Network, load_network
from shufflenet_mlflow.planning import BATCH_SIZE, choose_device, list_folder
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.resolve import resolve
from shufflenet_mlflow.start import run_of
from shufflenet_mlflow.stopping import StopFlag
from shufflenet_mlflow.tracking import AdoptedRun, adopted_run_id
from shufflenet_mlflow.tracking.messages import MetricPoints, Tags, now_ms


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate, and on what; None means as the checkpoint says."""

    ref: str
    model: str | None = None
    choices: str | None = None
    scales: str | None = None
    input_size: int | None = None
    mean_image: str | None = None
    val_dir: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    on_bad_image: str = "fail"
    tracking_uri: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class EvalSummary:
    """An evaluation's result and what was evaluated."""

    result: EvalResult
    checkpoint: Path
    run_id: str | None
    """The run that the checkpoint belongs to."""
    iters: int
    model: str

    def to_dict(self) -> dict[str, Any]:
        """The document of `eval --json`."""
        return {
            "top1": self.result.top1,
            "top5": self.result.top5,
            "loss": self.result.loss,
            "n": self.result.n,
            "skipped": self.result.skipped,
            "checkpoint": str(self.checkpoint),
            "run_id": self.run_id,
            "iters": self.iters,
            "model": self.model,
        }


def run_evaluation(request: EvalRequest, *, reporter: Reporter, stop: StopFlag) -> EvalSummary:
    """Evaluate a checkpoint on an image folder.

    Below `mlflow run` the result is logged to the run that was made for it.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
    """
    prepare_environment()
    adopted = adopted_run_id()
    if adopted is None:
        return _evaluate(request, reporter, stop)
    client = connect(request.tracking_uri)
    with AdoptedRun(client, adopted, tags={}) as run:
        summary = _evaluate(request, reporter, stop)
        result = summary.result
        run.send(Tags({"network": summary.model, "evaluated.run": summary.run_id or ""}))
        values = {"val/loss": result.loss, "val/top1": result.top1, "val/top5": result.top5}
        run.send(MetricPoints(values, summary.iters, now_ms()))
    return summary


def _usable_config(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's configuration; empty if it has none that makes sense, which evaluation can do without."""
    config = dict(payload.get("config", {})) if is_own(payload) else {}
    try:
        check_types(config)
    except ConfigError:
        return {}
    usable = config.get("batch_size", 1) >= 1 and config.get("workers", 0) >= 0
    return config if usable else {}


def _evaluate(request: EvalRequest, reporter: Reporter, stop: StopFlag) -> EvalSummary:
    resolved = resolve(request.ref, tracking_uri=request.tracking_uri, cache_dir=request.cache_dir)
    payload = read_checkpoint(resolved.path)
    source = f"the checkpoint {str(resolved.path)!r}"
    network = load_network(
        payload,
        source,
        asked=Architecture.asked(vars(request)),
        input_size=request.input_size,
        mean_image=request.mean_image,
    )
    trained = _usable_config(payload)
    skip_bad = request.on_bad_image == "skip"
    val_dir = request.val_dir if request.val_dir is not None else trained.get("val_dir")
    if val_dir is None and "val_dir" not in trained:
        raise ConfigError(f"--val-dir is missing: {source} does not say on what it was validated")
    listing = list_folder(val_dir, "val", option="--val-dir", skip_bad=skip_bad, cache_dir=request.cache_dir)
    _check_classes(network, listing, source, reporter)
    device = choose_device(request.device)
    settings = EvalSettings(
        batch_size=request.batch_size or trained.get("batch_size", BATCH_SIZE),
        workers=trained.get("workers", 0) if request.workers is None else request.workers,
        device=device,
    )
    with worker_deaths_reported():
        result = evaluate(
            network.model.to(device),
            listing,
            network.preprocess,
            settings,
            bad_images=BadImageLog(skip=skip_bad),
            reporter=reporter,
            stop=stop,
        )
    return EvalSummary(
        result=result,
        checkpoint=resolved.path,
        run_id=run_of(resolved.path, payload) or resolved.run_id,
        iters=payload.get("iters", resolved.iters) if is_own(payload) else resolved.iters,
        model=network.architecture.name,
    )


def _check_classes(network: Network, listing: ImageListing, source: str, reporter: Reporter) -> None:
    """Refuse a folder whose classes are not the network's; say so where that cannot be known.

    Raises:
        DataError: the names differ, or there are more of them than the network tells apart.
    """
    if network.class_to_idx is not None:
        require_same_classes(network.class_to_idx, listing, expected_in=source, option="--val-dir")
    if len(listing.classes) > network.num_classes:
        raise DataError(
            f"--val-dir {str(listing.root)!r} has {len(listing.classes)} classes, {source} tells "
            f"{network.num_classes} apart"
        )
    if network.class_to_idx is None:
        last = len(listing.classes) - 1
        reporter.note(
            f"{source} does not name its classes: {listing.classes[0]!r} … {listing.classes[-1]!r} are taken for "
            f"0 … {last} of its {network.num_classes}"
        )
