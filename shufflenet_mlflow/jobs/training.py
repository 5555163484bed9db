"""The training job: options in, a trained network out, on the disk and in MLflow."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shufflenet_mlflow.checkpoint import Retention, load_checkpoint, remove_leftovers
from shufflenet_mlflow.client import connect, prepare_environment
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, TrainConfig, check_resumable
from shufflenet_mlflow.data.folder import ImageListing
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.jobs.opening import ending_on_error, open_run
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.planning import Plan, check_same_data, choose_device, data_name, plan
from shufflenet_mlflow.recipe import make_optimizer, make_scheduler
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.spool import Spool
from shufflenet_mlflow.start import Init, Start, TrainRequest, find_init, find_start
from shufflenet_mlflow.state import TrainingState
from shufflenet_mlflow.stopping import StopFlag
from shufflenet_mlflow.tracking import (
    TrackedMetrics,
    TrackedStore,
    TrackingSession,
)
from shufflenet_mlflow.tracking.messages import DatasetInput, Message, Params, TextArtifact
from shufflenet_mlflow.train import TrainData, Trainer, TrainResult

if TYPE_CHECKING:
    pass

NOTHING_TRAINED = TrainResult(iters=0, epoch=0, loss=math.nan, val_top1=None, val_top5=None, checkpoint=None)


@dataclass(frozen=True)
class TrainSummary:
    """What a finished, or stopped, training run left behind."""

    run_id: str | None
    """None if the server was away all the time: MLflow has not made the run yet."""
    tracking_uri: str
    save_dir: Path
    result: TrainResult = NOTHING_TRAINED
    run_name: str = ""
    experiment_id: str = ""
    pending: int = 0
    """Entries that have not reached MLflow; they are kept in `save_dir`."""
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
            "pending": self.pending,
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
    client = connect(request.tracking_uri)
    with ExitStack() as stack:
        save_dir = _save_dir(request, start)
        spool = Spool(save_dir) if save_dir is not None else None  # nobody else may be at work there
        closing = stack.enter_context(ExitStack())
        if spool is not None:
            closing.callback(spool.close)
        opened = open_run(client, request, config, start, init, spool, reporter)
        if opened.made is not None:
            stack.enter_context(opened.made)
        init = None  # its weights have been copied
        if spool is None:
            save_dir = Path(DEFAULT_SAVE_ROOT) / opened.run
            with ending_on_error(client, opened.run):
                spool = Spool(save_dir)
        closing.pop_all()  # the session closes it
        session = TrackingSession(client, spool, opened.run, is_new=opened.is_new, reporter=reporter, stop=stop)
        remove_leftovers(spool.directory)
        with session:
            session.record(*opened.first, *_describe(config, data))
            summary = _train(session, request, planned, state, start, reporter, stop, client.tracking_uri)
        if summary.result.stopped_by is not None and opened.made is not None:
            opened.made.status = "KILLED"
    run_id = session.run_id
    return replace(
        summary, run_id=run_id, run_name=opened.name, experiment_id=opened.experiment_id, pending=spool.pending
    )


def _train(
    session: TrackingSession,
    request: TrainRequest,
    planned: Plan,
    state: TrainingState,
    start: Start | None,
    reporter: Reporter,
    stop: StopFlag,
    client_uri: str,
) -> TrainSummary:
    config, directory = planned.config, session.spool.directory
    metrics = TrackedMetrics(session.recorder)
    metrics.log(_cost(planned), 0)
    store = TrackedStore(
        directory,
        session.recorder,
        retention=Retention(config.keep_last, config.keep_best, config.keep_every),
        continue_on_error=config.on_save_error == "continue",
        reporter=reporter,
    )
    summary = TrainSummary(session.run_id, client_uri, directory)
    # A fork has no checkpoint of its own yet, also if it is stopped at once.
    continued = start if start is not None and not request.new_run else None
    if continued is not None:
        session.iters = continued.iters
        reporter.note(f"continuing run {session.recorder.run_id} from iteration {continued.iters} ({continued.path})")
        store.deliver_again()
        if continued.is_final(config.total_iters):
            reporter.note("nothing is left to train")
            if continued.best_top1 is not None:
                metrics.log({"best/val_top1": continued.best_top1}, 0)
            return replace(summary, result=_result_of(continued), was_complete=True)
    trainer = Trainer(
        config=config,
        data=planned.data,
        state=state,
        constants=_constants(planned),
        store=store,
        sink=metrics,
        reporter=reporter,
        stop=stop,
    )
    try:
        result = trainer.run(continued.path if continued is not None else None)
    except BaseException as error:
        _warn_of_failed_saves(store, error, reporter)
        raise
    finally:
        session.iters = state.iters
    if skipped := len(trainer.bad_images.seen):
        reporter.warn(f"{skipped} unreadable files were left out")
        metrics.log({"data/unreadable_files": skipped}, result.iters)
    if result.stopped_by is not None:
        session.status = "KILLED"
    return replace(summary, result=result)


def _warn_of_failed_saves(store: TrackedStore, error: BaseException, reporter: Reporter) -> None:
    """What ended the run is what the caller must hear of; that a checkpoint is missing too must not get lost."""
    try:
        store.finish()
    except CheckpointError as failure:
        if failure is not error:
            reporter.warn(str(failure))


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


def _save_dir(request: TrainRequest, start: Start | None) -> Path | None:
    """Where checkpoints go; None if that is called after the run that is yet to be made."""
    if request.save_dir is not None:
        return request.save_dir
    if start is not None and not request.new_run:
        if not start.in_cache:
            return start.path.parent
        if start.run_id is not None:
            return Path(DEFAULT_SAVE_ROOT) / start.run_id
    return None


def _describe(config: TrainConfig, data: TrainData) -> tuple[Message, ...]:
    """What the run is about: parameters, data sets, configuration, classes."""
    epochs = config.total_iters / data.order.iters_per_epoch
    values = {**config.to_dict(), "epochs": int(epochs) if epochs.is_integer() else epochs}
    for key in ("train_dir", "val_dir"):
        values[key] = values[key] or data_name(None)
    return (
        Params.of(values),
        _dataset(data.train, name=data_name(config.train_dir), context="training"),
        _dataset(data.val, name=data_name(config.val_dir), context="validation"),
        TextArtifact.of_json("config.json", config.to_dict()),
        TextArtifact.of_json("classes.json", data.train.class_to_idx),
    )


def _dataset(listing: ImageListing, *, name: str, context: str) -> DatasetInput:
    return DatasetInput(name, listing.digest, str(listing.root), len(listing), len(listing.classes), context)


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
