"""The MLflow run that a training writes to, and the folder of its checkpoints; also while the server is away."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.folders import remove_leftovers
from shufflenet_mlflow.checkpoints.references import RunReference, parse_reference
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, TrainConfig
from shufflenet_mlflow.data.datasets import data_name
from shufflenet_mlflow.errors import CheckpointError, ResumeError, TrackingError
from shufflenet_mlflow.export.logged import LogModels
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.launchers import attempt as attempts_before
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal, is_created, new_provisional_id
from shufflenet_mlflow.tracking.messages import Create, Reopen
from shufflenet_mlflow.tracking.names import (
    CONTINUES_TAG,
)
from shufflenet_mlflow.tracking.run import (
    WrapperRun,
    config_to_begin_with,
    make_run,
    new_run,
    reopen_run,
    require_not_beyond,
    tags_for_mlflow_run,
    take_mlflow_run_id,
)
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore
from shufflenet_mlflow.tracking.system_metrics import SystemMetrics
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.uris import is_server
from shufflenet_mlflow.training.loop import CheckpointStore, MetricSink, TrainResult, best_metrics
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.description import (
    config_digest,
    describe,
    describe_in_words,
    first_tags,
    model_cost_metrics,
    result_in_words,
)
from shufflenet_mlflow.workflows.training.followers import NoMetrics, NoStore
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.state import PreparedState

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient


NOTHING_TRAINED = TrainResult(iters=0, epoch=0, loss=math.nan, val_top1=None, val_top5=None, checkpoint=None)


@dataclass(frozen=True)
class TrainSummary:
    """Results of a finished, or stopped, training run."""

    run_id: str | None
    """None if the server was away all the time: MLflow has not created the run yet."""
    tracking_uri: str
    save_dir: Path
    result: TrainResult = NOTHING_TRAINED
    run_name: str = ""
    experiment_id: str = ""
    pending: int = 0
    """Journal entries that have not reached MLflow; they are kept in `save_dir`."""
    was_complete: bool = False
    """The run had ended before; nothing was trained."""
    is_leader: bool = True
    """False in those processes of a distributed job that neither write nor track."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `train --json`."""
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


class TrackedRun:
    """The run of a training, as a context manager: the leader opens and ends it, the other processes keep nothing.

    On leaving, the run ends with the status that is true, and what has not reached MLflow stays in the journal.
    """

    def __init__(
        self,
        context: JobContext,
        request: TrainRequest,
        attempt: Attempt,
        plan: Plan,
        prepared: PreparedState,
        store: Connection,
    ) -> None:
        self._context, self._request, self._attempt, self._plan = context, request, attempt, plan
        self._prepared = prepared
        self._mlflow = store
        self._closing = ExitStack()
        self._session: TrackingSession | None = None
        self._opened: OpenedRun | None = None
        self.store: CheckpointStore = NoStore()
        self.metrics: MetricSink = NoMetrics()
        self._summary = TrainSummary(None, "", Path(), is_leader=context.world.is_leader)

    def __enter__(self) -> "TrackedRun":
        try:
            # From here on there is a run to be ended: the session, and nothing before it, hears of a signal.
            self._context.world.on_leader(self._open, signals=False)
        except BaseException:
            self._closing.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.__exit__(*exception)

    def _open(self) -> None:
        """Open the journal, then the run, then the session that delivers to it."""
        reporter = self._context.reporter
        with ExitStack() as undo:
            journal: Journal | None = None
            save_dir = save_dir_of(self._attempt)
            if save_dir is not None:
                journal = Journal(save_dir)  # no other process may be at work there
                undo.callback(journal.close)
            opened = open_run(
                self._mlflow, self._request, self._attempt, self._plan, self._prepared.drift, journal, reporter
            )
            if opened.wrapper_run is not None:
                self._closing.enter_context(opened.wrapper_run)
            if journal is None:
                with _failed_on_error(self._mlflow, opened.run):
                    journal = Journal(Path(DEFAULT_SAVE_ROOT) / opened.run)
                undo.callback(journal.close)
            session = TrackingSession(
                self._mlflow.client,
                journal,
                opened.run,
                MESSAGE_KINDS,
                is_new=opened.is_new,
                reporter=reporter,
                stop=self._context.stop,
            )
            undo.pop_all()  # the session closes the journal
        self._opened, self._session = opened, self._closing.enter_context(session)
        remove_leftovers(journal.directory)
        config = self._plan.config
        session.record(
            *opened.first_messages,
            *describe(config, self._plan.data),
            describe_in_words(self._plan, "Not finished yet."),
        )
        self.metrics = TrackedMetrics(session.recorder)
        self.metrics.log(model_cost_metrics(self._plan), 0)
        store = TrackedStore(
            journal.directory,
            session.recorder,
            retention=Retention(config.keep_last, config.keep_best, config.keep_every),
            continue_on_error=config.on_save_error == "continue",
            reporter=reporter,
        )
        self.store = store
        point = self._attempt.own_point
        if point is not None:
            session.iters = point.iters
            reporter.note(f"continuing run {session.recorder.run_id} from iteration {point.iters} ({point.path})")
            store.deliver_again()
        self._summary = TrainSummary(session.run_id, self._mlflow.client.tracking_uri, journal.directory)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the training loop: sample the machine, and note how far the run has come, however the loop ends."""
        if self._session is None:
            yield
            return
        state = self._prepared.state
        try:
            with ExitStack() as watching:
                if not self._request.no_system_metrics:
                    watching.enter_context(SystemMetrics(self._session.recorder, lambda: state.iters))
                yield
        except BaseException as error:
            self._warn_of_failed_saves(error)
            raise
        finally:
            self._session.iters = state.iters

    def _warn_of_failed_saves(self, error: BaseException) -> None:
        """Report a checkpoint that is missing too; the error that ended the run is what the caller must see."""
        try:
            self.store.finish()
        except CheckpointError as failure:
            if failure is not error:
                self._context.reporter.warn(str(failure))

    def end(self, result: TrainResult, best: Mapping[str, Any] | None, *, unreadable: int, was_complete: bool) -> None:
        """Say how the training ended: description, status, logged models.

        Args:
            unreadable: image files that were left out.
            was_complete: the run had ended before, and nothing was trained.
        """
        self._summary = replace(self._summary, result=result, was_complete=was_complete)
        if self._session is None:
            return
        config = self._plan.config
        if unreadable:
            self._context.reporter.warn(f"{unreadable} unreadable files were skipped")
            self.metrics.log({"data/unreadable_files": unreadable}, result.iters)
        if was_complete:
            self._context.reporter.note("nothing is left to train")
            if best:
                self.metrics.log(best_metrics(best), 0)
        if result.stopped_by is not None:
            self._session.status = "KILLED"
            if self._opened is not None and self._opened.wrapper_run is not None:
                self._opened.wrapper_run.status = "KILLED"
        self._session.record(describe_in_words(self._plan, result_in_words(result, best, config.total_iters)))
        if result.stopped_by is None and not self._request.no_log_models:
            self._session.record(LogModels())

    def summary(self) -> TrainSummary:
        """Return what the run left behind, once it has ended."""
        if self._session is None or self._opened is None:
            return self._summary
        return replace(
            self._summary,
            run_id=self._session.run_id,
            run_name=self._opened.name,
            experiment_id=self._opened.experiment_id,
            pending=self._session.journal.pending,
        )


def save_dir_of(attempt: Attempt) -> Path | None:
    """Return the folder of the checkpoints; None if it is named after the run that is yet to be created."""
    if attempt.save_dir is not None:
        return attempt.save_dir
    point = attempt.own_point
    if point is not None:
        if not point.in_cache:
            return point.path.parent
        if point.run_id is not None:
            return Path(DEFAULT_SAVE_ROOT) / point.run_id
    return None


@contextmanager
def _failed_on_error(store: Connection, run: str) -> Iterator[None]:
    """If the block fails, end the run that was just created for it as FAILED."""
    try:
        yield
    except BaseException:
        if is_created(run):
            with suppress(TrackingError), mlflow_errors(f"end run {run}"):
                store.client.set_terminated(run, "FAILED")
        raise


@dataclass(frozen=True)
class OpenedRun:
    """The run to write to."""

    run: str
    """Its ID, or its provisional ID until MLflow creates it."""
    first_messages: tuple[Message, ...] = ()
    """Messages that go first, once the server answers."""
    is_new: bool = False
    name: str = ""
    experiment_id: str = ""
    wrapper_run: WrapperRun | None = None
    """The run that `mlflow run` created, if that is another one: it ends as this one does."""


def open_run(
    store: Connection,
    request: TrainRequest,
    attempt: Attempt,
    plan: Plan,
    drift: Mapping[str, tuple[Any, Any]],
    journal: Journal | None,
    reporter: Reporter,
) -> OpenedRun:
    """Open the resumed run, the one that `mlflow run` created, or a new one; while the server is away, provisionally.

    Args:
        drift: what has changed since the resume point was written: name -> (then, now).

    Raises:
        ResumeError: the run has gone on beyond the checkpoint, or no longer exists.
        TrackingError: the store refuses.
    """
    mlflow_run_id = take_mlflow_run_id()
    known = _run_to_continue(attempt, journal)
    tags = first_tags(attempt, plan.config, drift, is_continued=known is not None and attempt.own_point is not None)
    name = request.run_name or f"{plan.config.model} {data_name(plan.config.train_dir)} {plan.config.input_size}px"
    first: Create | Reopen
    if known is not None:
        first = Reopen(tags)
    elif mlflow_run_id is not None:
        known, first = mlflow_run_id, Reopen(tags_for_mlflow_run(request.run_name, tags))
    else:
        first = new_run(experiment=request.experiment, name=name, tags=tags)
    if known is not None and not is_created(known):  # the journal has yet to create it
        return OpenedRun(known, (first,), name=name)
    try:
        with store.impatient():
            unstarted = _find_unstarted_run(store.client, attempt, journal, plan.config)
            if unstarted is not None:
                known, first = unstarted, Reopen(tags)
            return _open_now(store.client, known, first, attempt, mlflow_run_id)
    except TrackingError as error:
        if error.answered or not is_server(store.client.tracking_uri):
            raise
        reporter.warn(f"{error}; training goes on; what belongs to MLflow is kept and sent later")
    return OpenedRun(known or new_provisional_id(), (first,), name=name)


def _run_to_continue(attempt: Attempt, journal: Journal | None) -> str | None:
    """Return the run, or its provisional ID, that an earlier attempt has written to; None for another run."""
    owner = journal.run if journal is not None else None
    if attempt.resume_point is not None:
        return None if attempt.is_fork else attempt.resume_point.run_id or owner
    if attempts_before() and journal is not None and owner and not is_created(journal.run_id_of(owner)):
        return owner  # MLflow was away then, too
    return None


def _find_unstarted_run(
    client: "MlflowClient", attempt: Attempt, journal: Journal | None, config: TrainConfig
) -> str | None:
    """Return a run that a killed process created with this configuration, and that has no checkpoint yet."""
    if not attempt.may_be_unstarted_run():
        return None
    candidates = [*attempt.unstarted_runs]
    if journal is not None and journal.run is not None:
        candidates.append(journal.run_id_of(journal.run))
    digest = config_digest(config.to_dict())
    for run_id in filter(is_created, candidates):
        before = config_to_begin_with(client, run_id)
        if before is not None and config_digest(before) == digest:
            return run_id
    return None


def _open_now(
    client: "MlflowClient", known: str | None, first: "Create | Reopen", attempt: Attempt, mlflow_run_id: str | None
) -> OpenedRun:
    """Create the run, or continue the known one, in a store that answers."""
    is_new = False
    if known is None:
        assert isinstance(first, Create)  # noqa: S101 - a known run is reopened
        known, is_new = make_run(client, first)
    else:
        _continue(client, known, dict(first.tags), attempt, is_mlflow_run=known == mlflow_run_id)
    run = client.get_run(known)
    wrapper_run = None
    if mlflow_run_id is not None and mlflow_run_id != known:
        wrapper_run = WrapperRun(client, mlflow_run_id, tags={CONTINUES_TAG: known})
    return OpenedRun(known, (), is_new, run.info.run_name, run.info.experiment_id, wrapper_run)


def _continue(
    client: "MlflowClient", run_id: str, tags: dict[str, str], attempt: Attempt, *, is_mlflow_run: bool
) -> None:
    try:
        if attempt.own_point is not None and not _means_latest(attempt.resume):
            require_not_beyond(client, run_id, attempt.own_point.iters)
        reopen_run(client, run_id, tags)
    except TrackingError as error:
        if is_mlflow_run or not error.answered:
            raise
        raise ResumeError(
            f"{error}; --new-run continues as a run of its own, --tracking-uri names another store",
            code="run-not-continued",
        ) from error


def _means_latest(resume: str) -> bool:
    """Whether resolving has looked for the newest checkpoint of a run, and may have passed over corrupt ones."""
    if resume == "auto":
        return False
    reference = parse_reference(resume)
    return isinstance(reference, RunReference) and reference.is_latest
