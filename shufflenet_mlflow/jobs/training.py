"""The training job: options in, a trained network out, on the disk and in MLflow."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shufflenet_mlflow.checkpoint import load_checkpoint
from shufflenet_mlflow.checkpoint.files import remove_temporaries
from shufflenet_mlflow.client import connect, prepare_environment
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, TrainConfig, check_resumable
from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.planning import Plan, check_same_data, choose_device, data_name, plan
from shufflenet_mlflow.recipe import make_optimizer, make_scheduler
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.resolve import RunReference, parse_reference
from shufflenet_mlflow.start import Init, Start, TrainRequest, find_init, find_start
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
    init = find_init(request) if start is None else None
    planned = plan(request, start, init)
    config, data = planned.config, planned.data
    if start is not None:
        check_resumable(start.config, config, new_run=request.new_run)
        check_same_data(start, data, new_run=request.new_run)
    device = choose_device(config.device)
    state = _fresh_state(planned, device, first_weights=start is None)
    if start is not None:
        state.load_state_dict(start.payload, config)
        start = start.without_tensors()
    if init is not None:
        _load_first_weights(state, init, data, reporter)
    run, made = _open_run(request, config, start, init)
    init = None  # its weights have been copied
    with ExitStack() as runs:
        for opened in filter(None, (made, run)):
            runs.enter_context(opened)
        save_dir = _save_dir(request, start, run.run_id)
        remove_temporaries(save_dir)
        _describe(run, config, data)
        delivery = Delivery(run.client, run.run_id, warn=reporter.warn, note=reporter.note)
        metrics = TrackedMetrics(delivery, run.logged_steps() if start else {})
        metrics.log(_cost(planned), 0)
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
            constants=_constants(planned),
            store=store,
            sink=metrics,
            reporter=reporter,
            stop=stop,
        )
        # A fork has no checkpoint of its own yet, also if it is stopped at once.
        result = trainer.run(start.path if start is not None and not request.new_run else None)
        if skipped := len(trainer.bad_images.seen):
            reporter.warn(f"{skipped} unreadable files were left out")
            metrics.log({"data/unreadable_files": skipped}, result.iters)
        if result.stopped_by is None:
            delivery.flush()
        else:
            for opened in filter(None, (made, run)):
                opened.status = "KILLED"
            try:
                delivery.flush()
            except TrackingError as error:  # leaving as asked matters more
                reporter.warn(str(error))
    return _summary(run, result, save_dir)


def _fresh_state(planned: Plan, device: torch.device, *, first_weights: bool) -> TrainingState:
    """The state before the first iteration.

    Args:
        first_weights: fetch the published weights, if they were asked for.
    """
    config = planned.config
    torch.manual_seed(config.seed)
    pretrained = first_weights and config.pretrained
    model = planned.architecture.build(config.num_classes, pretrained=pretrained).to(device)
    optimizer = make_optimizer(model, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return TrainingState(model, optimizer, make_scheduler(optimizer, config.total_iters), device)


def _load_first_weights(state: TrainingState, init: Init, data: TrainData, reporter: Reporter) -> None:
    """Take over the weights of `init`, but for a classifier of other classes.

    Raises:
        CheckpointError: they do not fit the network.
    """
    same = init.fits_classes(data.train.class_to_idx)
    report = load_checkpoint(
        state.model, init.payload, strict=False, reset_head=True if same else "always", source=repr(str(init.path))
    )
    reporter.note(f"begins with the weights of {init.path}")
    if init.described.class_to_idx is None and report.is_complete:
        reporter.note("it does not name its classes: its classifier, of the same width, is kept")


def _open_run(
    request: TrainRequest, config: TrainConfig, start: Start | None, init: Init | None
) -> tuple[TrackedRun, TrackedRun | None]:
    """The run to write to: the resumed one, the one that `mlflow run` made, or a new one.

    Returns:
        It, and the run that `mlflow run` made if that is another one: it ends as the resumed one does.
    """
    client = connect(request.tracking_uri)
    adopted = adopted_run_id()
    tags = {"network": config.model}
    if init is not None and init.run_id is not None:
        tags |= {"init_from.run": init.run_id, "init_from.checkpoint": init.path.name}
    if start is not None and start.run_id is not None:
        if not request.new_run:
            made = None
            if adopted is not None and adopted != start.run_id:
                made = TrackedRun.adopt(client, adopted, name=None, tags={"continues.run": start.run_id})
            may_rewind = _means_latest(request.resume)
            return TrackedRun.resume(client, start.run_id, iters=start.iters, may_rewind=may_rewind), made
        tags |= {"resumed.from_run": start.run_id, "resumed.from_iters": str(start.iters)}
    if adopted is not None:
        return TrackedRun.adopt(client, adopted, name=request.run_name, tags=tags), None
    name = request.run_name or f"{config.model} {data_name(config.train_dir)} {config.input_size}px"
    return TrackedRun.create(client, experiment=request.experiment, name=name, tags=tags), None


def _means_latest(resume: str) -> bool:
    """Whether resolving has looked for the newest checkpoint of a run, and may have passed over corrupt ones."""
    if resume == "auto":
        return False
    reference = parse_reference(resume)
    return isinstance(reference, RunReference) and reference.which == "latest" and reference.artifact is None


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


def _cost(planned: Plan) -> dict[str, float]:
    config = planned.config
    cost = model_cost(config.model, config.num_classes, config.input_size, **planned.architecture.kwargs())
    return {"model/parameters": cost.parameters, "model/macs": cost.macs}


def _constants(planned: Plan) -> dict[str, Any]:
    config, data = planned.config, planned.data
    kwargs = {"num_classes": config.num_classes, **planned.architecture.kwargs()}
    return {
        "model": {"name": config.model, "kwargs": kwargs},
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
