"""`shufflenet train`: options in, a trained network out, on the disk and in MLflow."""

from collections.abc import Sequence
from dataclasses import replace

from shufflenet_mlflow.config import RunConfig
from shufflenet_mlflow.runtime.compiler import import_compiler_late
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import usable_cores
from shufflenet_mlflow.runtime.launchers import Requeue, ended_with_launcher
from shufflenet_mlflow.runtime.progress import FollowerReporter, Reporter
from shufflenet_mlflow.runtime.rendezvous import joined
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.training.result import TrainResult
from shufflenet_mlflow.training.trainer import Callback, Trainer
from shufflenet_mlflow.workflows.options import check_training
from shufflenet_mlflow.workflows.searching.found import found_network
from shufflenet_mlflow.workflows.training.attempts import find_attempt
from shufflenet_mlflow.workflows.training.config import Plan, check_continuation, choose, complete_config
from shufflenet_mlflow.workflows.training.data import (
    Listed,
    check_headers,
    check_same_classes,
    check_same_data,
    list_data,
    named_as_before,
    warn_of_overlap,
)
from shufflenet_mlflow.workflows.training.description import constants
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import ResumePoint
from shufflenet_mlflow.workflows.training.run import Close, TrackedRun, TrainSummary
from shufflenet_mlflow.workflows.training.state import prepare_state, require_same_as_leader, usable_device


def run_training(request: TrainRequest, *, reporter: Reporter, stop: StopFlag) -> TrainSummary:
    """Train in a process of our own; see `carry_out`."""
    prepare_environment()
    if not request.options.get("compile"):
        import_compiler_late()
    return carry_out(request, reporter=reporter, stop=stop)


def carry_out(
    request: TrainRequest,
    *,
    reporter: Reporter,
    stop: StopFlag,
    callbacks: Sequence[Callback] = (),
    listed: Listed | None = None,
    close: Close | None = None,
) -> TrainSummary:
    """Train a network, or continue training one, with checkpoints on the disk and in MLflow.

    Nothing is written and no run is created before options and data have been found to work. Started by `torchrun`,
    it trains together with the other processes; the first of them, the leader, is the one that writes and tracks.

    Args:
        callbacks: hear what the loop does.
        listed: images that an earlier training of this process has listed, or this one will.
        close: is given what ends the run, to be closed in another thread; by default it ends here.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`; the run, if there was one by then, is marked FAILED.
        StopRequested: a signal arrived before there was a run.
    """
    names = ("search", "resume", "job", "save_dir", "tracking_uri", "grace")
    check_training({**request.options, **{name: getattr(request, name) for name in names}})
    if request.grace is not None:
        stop.grace = request.grace
    requeue = Requeue(request.requeue, reporter)
    try:
        with ended_with_launcher(stop), joined(stop) as world:
            context = JobContext(reporter if world.is_leader else FollowerReporter(world.rank), world)
            try:
                summary = _train(context, request, callbacks, Listed() if listed is None else listed, close)
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


def _train(
    context: JobContext, request: TrainRequest, callbacks: Sequence[Callback], listed: Listed, close: Close | None
) -> TrainSummary:
    """Go through the steps of a training run, in the same way in every process.

    An error in one process ends all of them at the same step; only what the leader alone does differs.
    """
    world, stop = context.world, context.stop

    # 1. Request: the tracking store is opened when it is first needed.
    with world.sync_errors():
        store = Connection(request.tracking_uri)
    if request.search is not None:
        found = world.on_leader(lambda: found_network(str(request.search), store))
        request = replace(request, options={**request.options, **found}, search=None)

    # 2. Resume point: what an earlier attempt, --resume or --init-from leave to continue.
    attempt = world.on_leader(lambda: find_attempt(request, store, context.reporter))

    # 3. Configuration, as far as it does not depend on the images.
    with world.sync_errors(), stop.at_once():
        choices = choose(request, attempt, world)

    # 4. Data, and with it the complete configuration.
    with world.sync_errors(), stop.at_once():
        data = named_as_before(attempt, list_data(choices, request.cache_dir, context.reporter, listed))
        check_same_classes(attempt, data)
        plan = Plan(complete_config(choices, data, world), choices.spec, data)
        check_continuation(attempt, plan.config)
        changes = check_same_data(
            attempt, data, context.reporter, may_differ=request.changed_data, is_leader=world.is_leader
        )
        plan = replace(plan, data_changes=changes)
        usable_device(plan.config, world)
    with world.sync_errors(), stop.at_once():
        if world.is_leader and not listed.is_checked(data):
            check_headers(attempt, data, context.reporter, skip=choices.skip_bad_images)
            warn_of_overlap(data, context.reporter)
    with world.sync_errors():
        require_same_as_leader(world, plan)

    # 5. State: network, optimizer, random numbers.
    with world.sync_errors(), stop.at_once():
        prepared = prepare_state(plan, attempt, context)
        attempt = attempt.without_tensors()
    point, state = attempt.own_point, prepared.state

    # 6. Run: the leader opens it, and ends it on leaving the block.
    with TrackedRun(context, request, attempt, plan, prepared, store, close) as run:
        # 7. Loop.
        was_complete = point is not None and point.is_final(plan.config.total_iters)
        unreadable: set[str] = set()
        if point is not None and was_complete:
            result, best = result_of(point), point.payload.get("best")
        else:
            if point is None:
                _note_threads(plan.config, context.reporter)
            trainer = Trainer.of_parts(
                config=plan.config,
                data=data,
                state=state,
                constants=constants(
                    plan, prepared.environment, teacher_digest=prepared.teacher_digest, is_leader=world.is_leader
                ),
                store=run.store,
                sink=run.metrics,
                context=context,
                teacher=prepared.teacher,
                callbacks=callbacks,
            )
            if attempt.resume_point is not None:
                trainer.load_callbacks(attempt.resume_point.payload)
            with run.watched():
                result = trainer.run(point.path if point is not None else None)
            best, unreadable = state.best, trainer.all_bad_images()

        # 8. End: what the run says of itself from now on.
        with world.sync_errors(signals=False):
            run.end(result, best, unreadable=len(unreadable), was_complete=was_complete)
    with world.sync_errors(signals=False):
        run.require_kept()
    return run.summary()


def _note_threads(config: RunConfig, reporter: Reporter) -> None:
    if config.threads is not None:
        workers = counted(config.workers, "process", "processes") if config.workers else "the same process"
        threads, cores = counted(config.threads, "thread"), counted(usable_cores(), "core")
        reporter.note(f"computing with {threads}, decoding in {workers}, on {cores}")


def result_of(point: ResumePoint) -> TrainResult:
    """Return how the run ended that wrote this final checkpoint."""
    payload = point.payload
    return TrainResult(
        iters=point.iters,
        epoch=payload["epoch"],
        loss=payload["loss"],
        validation={name: value for name, value in payload["metrics"].items() if name.startswith("val/")},
        best=payload.get("best"),
        checkpoint=point.path,
        ended_by_patience=point.iters < point.config["total_iters"] and not payload.get("stop_reason"),
        stop_reason=str(payload.get("stop_reason", "")),
    )
