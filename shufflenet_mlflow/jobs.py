"""Whole jobs, put together from the parts: train a network, evaluate a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shufflenet_mlflow.checkpoint import load_checkpoint, read_checkpoint
from shufflenet_mlflow.checkpoint.files import remove_temporaries
from shufflenet_mlflow.client import connect, prepare_environment
from shufflenet_mlflow.config import (
    DEFAULT_SAVE_ROOT,
    TrainConfig,
    check_resumable,
)
from shufflenet_mlflow.data.folder import require_same_classes
from shufflenet_mlflow.data.loader import BadImageLog
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.errors import CheckpointError, ResumeError, TrackingError
from shufflenet_mlflow.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.models import create_model
from shufflenet_mlflow.planning import (
    Start,
    TrainRequest,
    check_same_data,
    choose_device,
    data_name,
    find_start,
    list_folder,
    plan,
)
from shufflenet_mlflow.recipe import make_optimizer, make_scheduler
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.resolve import resolve
from shufflenet_mlflow.state import TrainingState
from shufflenet_mlflow.stopping import StopFlag
from shufflenet_mlflow.tracking import (
    Delivery,
    TrackedMetrics,
    TrackedRun,
    TrackedStore,
    adopted_run_id,
)
from shufflenet_mlflow.train import TrainData, Trainer, TrainResult


@dataclass(frozen=True)
class TrainSummary:
    """What a finished, or stopped, training run left behind."""

    run_id: str
    run_name: str
    experiment_id: str
    tracking_uri: str
    result: TrainResult
    save_dir: Path
    was_complete: bool = False
    """The run had ended before; nothing was trained."""

    def to_dict(self) -> dict[str, Any]:
        """The document of `train --json`."""
        result = self.result
        return {
            "run_id": self.run_id,
            "iters": result.iters,
            "epoch": result.epoch,
            "loss": result.loss,
            "val_top1": result.val_top1,
            "val_top5": result.val_top5,
            "checkpoint": str(result.checkpoint) if result.checkpoint else None,
            "save_dir": str(self.save_dir),
        }


def run_training(request: TrainRequest, *, reporter: Reporter, stop: StopFlag) -> TrainSummary:
    """Train a network, or continue training one, with checkpoints on the disk and in MLflow.

    Nothing is written and no run is made before options and data have been found to work.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`; the run, if there was one by then, is marked FAILED.
    """
    prepare_environment()
    start = find_start(request)
    config, data = plan(request, start)
    if start is not None:
        check_resumable(start.config, config, new_run=request.new_run)
        check_same_data(start, data, new_run=request.new_run)
    device = choose_device(config.device)
    state = _fresh_state(config, device)
    if start is not None:
        state.load_state_dict(start.payload)
    run = _open_run(request, config, start)
    with run:
        save_dir = _save_dir(request, start, run.run_id)
        remove_temporaries(save_dir)
        _describe(run, config, data)
        delivery = Delivery(run.client, run.run_id, warn=reporter.warn, note=reporter.note)
        metrics = TrackedMetrics(delivery, run.logged_steps() if start else {})
        store = TrackedStore(save_dir, delivery, metrics)
        if start is not None and not request.new_run:
            reporter.note(f"continuing run {run.run_id} from iteration {start.iters} ({start.path})")
            store.deliver_again(start.path, best=start.is_best)
            if start.is_final(config.total_iters):
                reporter.note("nothing is left to train")
                if start.best_top1 is not None:
                    metrics.log({"best/val_top1": start.best_top1}, 0)
                delivery.flush()
                return _summary(run, _result_of(start), save_dir, was_complete=True)
        trainer = Trainer(
            config=config,
            data=data,
            state=state,
            constants=_constants(config, data),
            store=store,
            sink=metrics,
            reporter=reporter,
            stop=stop,
        )
        result = trainer.run(start.path if start else None)
        if skipped := len(trainer.bad_images.seen):
            reporter.warn(f"{skipped} unreadable files were left out")
            metrics.log({"data/unreadable_files": skipped}, result.iters)
        delivery.flush()
        if result.stopped_by is not None:
            run.status = "KILLED"
    return _summary(run, result, save_dir)


def _fresh_state(config: TrainConfig, device: torch.device) -> TrainingState:
    torch.manual_seed(config.seed)
    model = create_model(config.model, config.num_classes).to(device)
    optimizer = make_optimizer(model, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return TrainingState(model, optimizer, make_scheduler(optimizer, config.total_iters), device)


def _open_run(request: TrainRequest, config: TrainConfig, start: Start | None) -> TrackedRun:
    """The run to write to: the resumed one, the one that `mlflow run` made, or a new one."""
    client = connect(request.tracking_uri)
    adopted = adopted_run_id()
    tags = {"network": config.model}
    if start is not None and start.run_id is not None:
        if not request.new_run:
            try:
                run = TrackedRun.resume(client, start.run_id, iters=start.iters)
            except TrackingError as error:
                raise ResumeError(
                    f"{error}; --new-run continues as a run of its own, --tracking-uri names another store"
                ) from error
            if adopted is not None and adopted != start.run_id:
                made = TrackedRun.adopt(client, adopted, name=None, tags={"continues.run": run.run_id})
                made.finish("FINISHED")
            return run
        tags |= {"resumed.from_run": start.run_id, "resumed.from_iters": str(start.iters)}
    if adopted is not None:
        return TrackedRun.adopt(client, adopted, name=request.run_name, tags=tags)
    name = request.run_name or f"{config.model} {data_name(config.train_dir)} {config.input_size}px"
    return TrackedRun.create(client, experiment=request.experiment, name=name, tags=tags)


def _save_dir(request: TrainRequest, start: Start | None, run_id: str) -> Path:
    if request.save_dir is not None:
        return request.save_dir
    if start is not None and not start.in_cache and not request.new_run:
        return start.path.parent
    return Path(DEFAULT_SAVE_ROOT) / run_id


def _describe(run: TrackedRun, config: TrainConfig, data: TrainData) -> None:
    """What the run is about: parameters, data sets, configuration, classes."""
    epochs = config.total_iters / data.order.iters_per_epoch
    values = {**config.to_dict(), "epochs": int(epochs) if epochs.is_integer() else epochs}
    for key in ("train_dir", "val_dir"):
        values[key] = values[key] or data_name(None)
    run.log_params(values)
    run.log_dataset(data.train, name=data_name(config.train_dir), context="training")
    run.log_dataset(data.val, name=data_name(config.val_dir), context="validation")
    run.log_dict(config.to_dict(), "config.json")
    run.log_dict(data.train.class_to_idx, "classes.json")


def _constants(config: TrainConfig, data: TrainData) -> dict[str, Any]:
    return {
        "model": {"name": config.model, "kwargs": {"num_classes": config.num_classes}},
        "preprocess": data.preprocess.to_dict(),
        "class_to_idx": data.train.class_to_idx,
        "config": config.to_dict(),
        "data": {"train_digest": data.train.digest, "val_digest": data.val.digest},
    }


def _result_of(start: Start) -> TrainResult:
    payload = start.payload
    return TrainResult(
        iters=start.iters,
        epoch=payload["epoch"],
        loss=payload["loss"],
        val_top1=payload["metrics"].get("val/top1"),
        val_top5=payload["metrics"].get("val/top5"),
        checkpoint=start.path,
    )


def _summary(run: TrackedRun, result: TrainResult, save_dir: Path, *, was_complete: bool = False) -> TrainSummary:
    return TrainSummary(
        run_id=run.run_id,
        run_name=run.name,
        experiment_id=run.experiment_id,
        tracking_uri=run.client.tracking_uri,
        result=result,
        save_dir=save_dir,
        was_complete=was_complete,
    )


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate, and on what; None means as the checkpoint's run did."""

    ref: str
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


def load_network(payload: Mapping[str, Any], source: str) -> tuple[nn.Module, Preprocess]:
    """Build the network that a checkpoint names, with its weights.

    Args:
        payload: what `read_checkpoint` returned.
        source: what to call it in messages.

    Raises:
        CheckpointError: it does not name its network, or does not fit it.
    """
    try:
        name = payload["model"]["name"]
        model = create_model(name, **payload["model"]["kwargs"])
        preprocess = Preprocess.from_dict(payload["preprocess"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source} does not say which network it is of (no {error}); only checkpoints written by this project do"
        ) from error
    load_checkpoint(model, payload)
    return model, preprocess


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
    with TrackedRun.adopt(client, adopted, name=None, tags={}) as run:
        summary = _evaluate(request, reporter, stop)
        run.set_tags({"network": summary.model, "evaluated.run": summary.run_id or ""})
        delivery = Delivery(client, adopted, warn=reporter.warn, note=reporter.note)
        TrackedMetrics(delivery, {}).log(
            {
                "val/loss": summary.result.loss,
                "val/top1": summary.result.top1,
                "val/top5": summary.result.top5,
            },
            summary.iters,
        )
        delivery.flush()
    return summary


def _evaluate(request: EvalRequest, reporter: Reporter, stop: StopFlag) -> EvalSummary:
    resolved = resolve(request.ref, tracking_uri=request.tracking_uri, cache_dir=request.cache_dir)
    payload = read_checkpoint(resolved.path)
    model, preprocess = load_network(payload, repr(str(resolved.path)))
    trained = dict(payload.get("config", {}))
    skip_bad = request.on_bad_image == "skip"
    val_dir = request.val_dir if request.val_dir is not None else trained.get("val_dir")
    listing = list_folder(val_dir, "val", option="--val-dir", skip_bad=skip_bad, cache_dir=request.cache_dir)
    require_same_classes(
        payload["class_to_idx"],
        listing,
        expected_in=f"the checkpoint {str(resolved.path)!r}",
        option="--val-dir",
    )
    device = choose_device(request.device)
    settings = EvalSettings(
        batch_size=request.batch_size or trained.get("batch_size", 64),
        workers=trained.get("workers", 0) if request.workers is None else request.workers,
        device=device,
    )
    result = evaluate(
        model.to(device),
        listing,
        preprocess,
        settings,
        bad_images=BadImageLog(skip=skip_bad),
        reporter=reporter,
        stop=stop,
    )
    return EvalSummary(
        result=result,
        checkpoint=resolved.path,
        run_id=payload.get("run_id") or resolved.run_id,
        iters=int(payload.get("iters", resolved.iters)),
        model=payload["model"]["name"],
    )
