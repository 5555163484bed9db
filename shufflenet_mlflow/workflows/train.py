"""The training job: options in, a trained network out, on the disk and in MLflow."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import remove_leftovers
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, check_grace, check_job
from shufflenet_mlflow.errors import CheckpointError, NoCheckpointError
from shufflenet_mlflow.export import LogModels
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.launchers import Requeue, ended_with_mlflow_run
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.rendezvous import joined
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.tracking.client import connect, prepare_environment
from shufflenet_mlflow.tracking.journal import Journal, is_created
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore
from shufflenet_mlflow.tracking.system_metrics import SystemMetrics
from shufflenet_mlflow.training.loop import Trainer, TrainResult, best_metrics
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.training.attempts import begin_again, find_attempt, may_begin_again
from shufflenet_mlflow.workflows.training.description import (
    constants,
    cost,
    describe,
    describe_in_words,
    result_in_words,
)
from shufflenet_mlflow.workflows.training.followers import NoMetrics, NoStore, QuietReporter
from shufflenet_mlflow.workflows.training.request import TrainRequest, with_whole_ids
from shufflenet_mlflow.workflows.training.resume import ResumePoint, find_initial_weights, find_resume_point
from shufflenet_mlflow.workflows.training.run import ending_on_error, open_run
from shufflenet_mlflow.workflows.training.sharing import receive_beginning, share_beginning
from shufflenet_mlflow.workflows.training.state import Prepared, prepare

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
    is_leader: bool = True
    """False in those processes of a distributed job that neither write nor track."""

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

    Nothing is written and no run is made before options and data have been found to work. Started by `torchrun`, it
    trains together with the other processes; the first of them is the one that writes and tracks.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`; the run, if there was one by then, is marked FAILED.
        StopRequested: a signal arrived before there was a run.
    """
    prepare_environment()
    check_job(request.job)
    stop.grace = check_grace(request.grace)
    another = Requeue(request.requeue, reporter)
    try:
        with ended_with_mlflow_run(), joined(stop) as world:
            work, to_tell = (_lead, reporter) if world.is_leader else (_follow, QuietReporter(world.rank))
            try:
                summary = work(world, request, to_tell, stop)
            except StopRequested:
                another.ask_if_warned(stop)
                world.barrier_before_exit()
                raise
            if summary.result.stopped_by is not None:
                another.ask_if_warned(stop)
                world.barrier_before_exit()
            return summary
    finally:
        another.ask_if_warned(stop)


def _lead(world: World, request: TrainRequest, reporter: Reporter, stop: StopFlag) -> TrainSummary:
    client = connect(request.tracking_uri)
    with world.sync_errors(stop), stop.at_once():
        request = with_whole_ids(request)
        request, begun = find_attempt(client, request, reporter)
        try:
            start = find_resume_point(request)
        except NoCheckpointError as error:
            start = None
            request, begun = begin_again(client, request, error)
            reporter.note(f"run {begun[0]} has no checkpoint yet: it begins again")
        init = find_initial_weights(request) if start is None else None
    share_beginning(world, request, start, init)
    prepared = prepare(world, request, start, init, reporter, stop)
    start = start.without_tensors() if start is not None else None
    with ExitStack() as stack:
        # From here on there is a run to be ended: the session hears of a signal, no sooner.
        with world.sync_errors(stop, signals=False), ExitStack() as closing:
            save_dir = _save_dir(request, start)
            journal = Journal(save_dir) if save_dir is not None else None  # nobody else may be at work there
            if journal is not None:
                closing.callback(journal.close)
                if journal.run is not None:
                    begun = [*begun, journal.run_id_of(journal.run)]
            opened = open_run(
                client,
                request,
                prepared.planned.config,
                start,
                init,
                journal,
                reporter,
                begun=[run for run in begun if is_created(run)] if may_begin_again(request, start) else [],
                drifted=prepared.drifted,
            )
            init = None  # its weights have been copied
            if opened.made is not None:
                stack.enter_context(opened.made)
            if journal is None:
                save_dir = Path(DEFAULT_SAVE_ROOT) / opened.run
                with ending_on_error(client, opened.run):
                    journal = Journal(save_dir)
            closing.pop_all()  # the session closes it
        session = TrackingSession(
            client, journal, opened.run, MESSAGE_KINDS, is_new=opened.is_new, reporter=reporter, stop=stop
        )
        remove_leftovers(journal.directory)
        with session:
            session.record(
                *opened.first,
                *describe(prepared.planned.config, prepared.planned.data),
                describe_in_words(prepared.planned, "Not finished yet."),
            )
            summary = _train(session, request, prepared, start, reporter, stop, client.tracking_uri)
        if summary.result.stopped_by is not None and opened.made is not None:
            opened.made.status = "KILLED"
    return replace(
        summary,
        run_id=session.run_id,
        run_name=opened.name,
        experiment_id=opened.experiment_id,
        pending=journal.pending,
    )


def _follow(world: World, request: TrainRequest, reporter: Reporter, stop: StopFlag) -> TrainSummary:
    """The work of a process that neither writes nor tracks."""
    with world.sync_errors(stop):
        pass  # the leader finds out what is continued
    request, start, init = receive_beginning(world, request)
    prepared = prepare(world, request, start, init, reporter, stop)
    continued = None
    if start is not None:
        start = start.without_tensors()
        continued = None if request.new_run else start
    with world.sync_errors(stop, signals=False):
        pass  # the leader opens the run
    summary = TrainSummary(None, "", Path(), is_leader=False)
    config = prepared.planned.config
    if continued is not None and continued.is_final(config.total_iters):
        return replace(summary, was_complete=True)
    trainer = Trainer(
        config=config,
        data=prepared.planned.data,
        state=prepared.state,
        constants={},
        store=NoStore(),
        sink=NoMetrics(),
        reporter=reporter,
        stop=stop,
        world=world,
    )
    result = trainer.run(continued.path if continued is not None else None)
    trainer.all_bad_images()
    return replace(summary, result=result)


def _train(
    session: TrackingSession,
    request: TrainRequest,
    prepared: Prepared,
    start: ResumePoint | None,
    reporter: Reporter,
    stop: StopFlag,
    client_uri: str,
) -> TrainSummary:
    planned, state = prepared.planned, prepared.state
    config, directory = planned.config, session.journal.directory
    metrics = TrackedMetrics(session.recorder)
    metrics.log(cost(planned), 0)
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
            if continued.payload.get("best"):
                metrics.log(best_metrics(continued.payload["best"]), 0)
            _tell_of_the_end(session, request, prepared, result := _result_of(continued), continued.payload.get("best"))
            return replace(summary, result=result, was_complete=True)
    trainer = Trainer(
        config=config,
        data=planned.data,
        state=state,
        constants=constants(planned, prepared.environment),
        store=store,
        sink=metrics,
        reporter=reporter,
        stop=stop,
        world=prepared.world,
    )
    try:
        with ExitStack() as watching:
            if not request.no_system_metrics:
                watching.enter_context(SystemMetrics(session.recorder, lambda: state.iters))
            result = trainer.run(continued.path if continued is not None else None)
    except BaseException as error:
        _warn_of_failed_saves(store, error, reporter)
        raise
    finally:
        session.iters = state.iters
    if skipped := len(trainer.all_bad_images()):
        reporter.warn(f"{skipped} unreadable files were left out")
        metrics.log({"data/unreadable_files": skipped}, result.iters)
    if result.stopped_by is not None:
        session.status = "KILLED"
    _tell_of_the_end(session, request, prepared, result, state.best)
    return replace(summary, result=result)


def _tell_of_the_end(
    session: TrackingSession,
    request: TrainRequest,
    prepared: Prepared,
    result: TrainResult,
    best: Mapping[str, Any] | None,
) -> None:
    """What the run says of itself from now on, and the models that it is remembered by."""
    config = prepared.planned.config
    session.record(describe_in_words(prepared.planned, result_in_words(result, best, config.total_iters)))
    if result.stopped_by is None and not request.no_log_models:
        session.record(LogModels())


def _warn_of_failed_saves(store: TrackedStore, error: BaseException, reporter: Reporter) -> None:
    """What ended the run is what the caller must hear of; that a checkpoint is missing too must not get lost."""
    try:
        store.finish()
    except CheckpointError as failure:
        if failure is not error:
            reporter.warn(str(failure))


def _save_dir(request: TrainRequest, start: ResumePoint | None) -> Path | None:
    """Where checkpoints go; None if that is called after the run that is yet to be made."""
    if request.save_dir is not None:
        return request.save_dir
    if start is not None and not request.new_run:
        if not start.in_cache:
            return start.path.parent
        if start.run_id is not None:
            return Path(DEFAULT_SAVE_ROOT) / start.run_id
    return None


def _result_of(start: ResumePoint) -> TrainResult:
    payload = start.payload
    return TrainResult(
        iters=start.iters,
        epoch=payload["epoch"],
        loss=payload["loss"],
        val_top1=payload["metrics"].get("val/top1"),
        val_top5=payload["metrics"].get("val/top5"),
        checkpoint=start.path,
    )
