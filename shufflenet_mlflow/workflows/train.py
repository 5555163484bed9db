"""`shufflenet train`: options in, a trained network out, on the disk and in MLflow."""

from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.launchers import Requeue, ended_with_mlflow_run
from shufflenet_mlflow.runtime.progress import FollowerReporter, Reporter
from shufflenet_mlflow.runtime.rendezvous import joined
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.training.loop import Trainer, TrainResult
from shufflenet_mlflow.workflows.options import check_training
from shufflenet_mlflow.workflows.training.attempts import find_attempt
from shufflenet_mlflow.workflows.training.config import Plan, check_continuation, choose, complete_config
from shufflenet_mlflow.workflows.training.data import check_same_data, list_data
from shufflenet_mlflow.workflows.training.description import constants
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import ResumePoint
from shufflenet_mlflow.workflows.training.run import TrackedRun, TrainSummary
from shufflenet_mlflow.workflows.training.state import prepare_state, require_same_as_leader, usable_device


def run_training(request: TrainRequest, *, reporter: Reporter, stop: StopFlag) -> TrainSummary:
    """Train a network, or continue training one, with checkpoints on the disk and in MLflow.

    Nothing is written and no run is created before options and data have been found to work. Started by `torchrun`,
    it trains together with the other processes; the first of them, the leader, is the one that writes and tracks.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`; the run, if there was one by then, is marked FAILED.
        StopRequested: a signal arrived before there was a run.
    """
    names = ("resume", "job", "save_dir", "tracking_uri", "grace")
    check_training({**request.options, **{name: getattr(request, name) for name in names}})
    prepare_environment()
    if request.grace is not None:
        stop.grace = request.grace
    requeue = Requeue(request.requeue, reporter)
    try:
        with ended_with_mlflow_run(), joined(stop) as world:
            context = JobContext(reporter if world.is_leader else FollowerReporter(world.rank), world)
            try:
                summary = _train(context, request)
            except StopRequested:
                requeue.ask_if_warned(stop)
                world.barrier_before_exit()
                raise
            if summary.result.stopped_by is not None:
                requeue.ask_if_warned(stop)
                world.barrier_before_exit()
            return summary
    finally:
        requeue.ask_if_warned(stop)


def _train(context: JobContext, request: TrainRequest) -> TrainSummary:
    """Go through the steps of a training run, in the same way in every process.

    An error in one process ends all of them at the same step; only what the leader alone does differs.
    """
    world, stop = context.world, context.stop

    # 1. Request: the tracking store is opened when it is first needed.
    with world.sync_errors():
        store = Connection(request.tracking_uri)

    # 2. Resume point: what an earlier attempt, --resume or --init-from leave to continue.
    attempt = world.on_leader(lambda: find_attempt(request, store, context.reporter))

    # 3. Configuration, as far as it does not depend on the images.
    with world.sync_errors(), stop.at_once():
        choices = choose(request, attempt, world)

    # 4. Data, and with it the complete configuration.
    with world.sync_errors(), stop.at_once():
        data = list_data(choices, request.cache_dir, context.reporter)
        plan = Plan(complete_config(choices, data, world), choices.spec, data)
        check_continuation(attempt, plan.config)
        check_same_data(attempt, data)
        usable_device(plan.config, world)
    with world.sync_errors():
        require_same_as_leader(world, plan)

    # 5. State: network, optimizer, random numbers.
    with world.sync_errors(), stop.at_once():
        prepared = prepare_state(plan, attempt, context)
        attempt = attempt.without_tensors()
    point, state = attempt.own_point, prepared.state

    # 6. Run: the leader opens it, and ends it on leaving the block.
    with TrackedRun(context, request, attempt, plan, prepared, store) as run:
        # 7. Loop.
        was_complete = point is not None and point.is_final(plan.config.total_iters)
        unreadable: set[str] = set()
        if point is not None and was_complete:
            result, best = result_of(point), point.payload.get("best")
        else:
            trainer = Trainer(
                config=plan.config,
                data=data,
                state=state,
                constants=constants(plan, prepared.environment),
                store=run.store,
                sink=run.metrics,
                context=context,
            )
            with run.watched():
                result = trainer.run(point.path if point is not None else None)
            best, unreadable = state.best, trainer.all_bad_images()

        # 8. End: what the run says of itself from now on.
        with world.sync_errors(signals=False):
            run.end(result, best, unreadable=len(unreadable), was_complete=was_complete)
    return run.summary()


def result_of(point: ResumePoint) -> TrainResult:
    """Return how the run ended that wrote this final checkpoint."""
    payload = point.payload
    return TrainResult(
        iters=point.iters,
        epoch=payload["epoch"],
        loss=payload["loss"],
        val_top1=payload["metrics"].get("val/top1"),
        val_top5=payload["metrics"].get("val/top5"),
        checkpoint=point.path,
    )
