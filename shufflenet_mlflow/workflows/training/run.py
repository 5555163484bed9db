"""The MLflow run that a training writes to, and the folder of its checkpoints; also while the server is away."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import remove_leftovers
from shufflenet_mlflow.checkpoints.references import run_folder
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT
from shufflenet_mlflow.errors import CheckpointError, DeletedError, TrackingError
from shufflenet_mlflow.export.logged import LogModels
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import is_created
from shufflenet_mlflow.tracking.lease import Lease
from shufflenet_mlflow.tracking.run import (
    WrapperRun,
)
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore
from shufflenet_mlflow.tracking.system_metrics import SystemMetrics
from shufflenet_mlflow.training.keeping import CheckpointStore, MetricSink, NoMetrics, NoStore
from shufflenet_mlflow.training.result import TrainResult, best_metrics
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.description import (
    config_digest,
    describe,
    describe_in_words,
    model_cost_metrics,
    result_in_words,
)
from shufflenet_mlflow.workflows.training.opening import OpenedRun, open_run
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.state import PreparedState
from shufflenet_mlflow.workflows.training.turn import Turn

Close = Callable[[ExitStack], object]
"""Takes over what ends a run, whose end is in the journal already: its delivery, its status, its journal."""

NOTHING_TRAINED = TrainResult(iters=0, epoch=0, loss=math.nan, validation={}, best=None, checkpoint=None)


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
    refused: int = 0
    """Entries that MLflow has refused; they are kept in `save_dir`, too."""
    restoring: str = ""
    """Command that restores the run, which was deleted meanwhile; only then can the rest be delivered."""
    was_complete: bool = False
    """The run had ended before; nothing was trained."""
    is_kept: bool = False
    """Everything up to the run's end is on the disk, although it may have yet to reach MLflow; see `Close`."""
    is_leader: bool = True
    """False in those processes of a distributed job that neither write nor track."""

    @property
    def iters(self) -> int:
        """Completed iterations."""
        return self.result.iters

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.result.epoch

    @property
    def loss(self) -> float:
        """Mean training loss of the last iterations."""
        return self.result.loss

    @property
    def validation(self) -> Mapping[str, float]:
        """Metrics of the last validation, such as `val/top1` in 0..1; empty if there was none."""
        return self.result.validation

    @property
    def val_top1(self) -> float | None:
        """Accuracy of the last validation, in 0..1; None if there was none."""
        return self.result.val_top1

    @property
    def best(self) -> Mapping[str, Any] | None:
        """`val_top1` and `iters` of the best validation."""
        return self.result.best

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint's file; None if training was stopped before the first iteration."""
        return self.result.checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `train --json`."""
        result, best = self.result, self.result.best or {}
        return {
            "run_id": self.run_id,
            "iters": result.iters,
            "epoch": result.epoch,
            "loss": result.loss,
            **result.validation_fields(),
            "best_val_top1": best.get("val_top1"),
            "best_iters": best.get("iters"),
            "checkpoint": str(result.checkpoint) if result.checkpoint else None,
            "save_dir": str(self.save_dir),
            "pending": self.pending,
            "refused": self.refused,
            "ended_by_patience": result.ended_by_patience,
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
        close: Close | None = None,
    ) -> None:
        self._close = close
        self._context, self._request, self._attempt, self._plan = context, request, attempt, plan
        self._prepared = prepared
        self._mlflow = store
        self._closing = ExitStack()
        self._session: TrackingSession | None = None
        self._has_ended = False
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
        if self._close is None or exception[0] is not None:
            self._closing.__exit__(*exception)
            return
        with ExitStack() as closing:
            closing.push(self._closing.pop_all())
            if self._session is not None:
                self._summary = replace(self._summary, is_kept=self._session.seal())
            self._close(closing.pop_all())

    def _open(self) -> None:
        """Open the journal, then the run, then the session that delivers to it."""
        reporter = self._context.reporter
        with ExitStack() as undo:
            journal: Journal | None = None
            save_dir = save_dir_of(self._attempt)
            if save_dir is not None:
                journal = Journal(save_dir)  # no other process may be at work there
                undo.callback(journal.close)
            point = self._attempt.own_point
            lease = Lease(
                iters=point.iters if point is not None else 0,
                takes_over=self._request.take_over,
                after=point.writer if point is not None else None,
            )
            turn = Turn(lease, self._attempt.is_automatic, self._context)
            opened = open_run(
                self._mlflow, self._request, self._attempt, self._plan, self._prepared.drift, journal, turn
            )
            if opened.wrapper_run is not None:
                self._closing.enter_context(opened.wrapper_run)
            if journal is None:
                with _failed_on_error(self._mlflow, opened.run):
                    journal = Journal(run_folder(Path(DEFAULT_SAVE_ROOT), opened.run))
                undo.callback(journal.close)
            session = TrackingSession(
                self._mlflow.client,
                journal,
                opened.run,
                MESSAGE_KINDS,
                is_new=opened.is_new,
                lease=lease,
                config=config_digest(self._plan.config.to_dict()),
                reporter=reporter,
                stop=self._context.stop,
                ended=opened.ended,
            )
            undo.pop_all()  # the session closes the journal
        if opened.wrapper_run is not None:
            self._closing.callback(self._fail_wrapper_if_lost, opened.wrapper_run)
        self._opened, self._session = opened, self._closing.enter_context(session)
        remove_leftovers(journal.directory)
        config = self._plan.config
        session.record(*opened.first_messages, *describe(config, self._plan.data))
        if opened.ended is None:
            session.record(describe_in_words(self._plan, "Not finished yet."))
        self.metrics = TrackedMetrics(session.recorder, afterwards=model_cost_metrics(self._plan))
        store = TrackedStore(
            journal.directory,
            session.recorder,
            retention=Retention(config.keep_last, config.keep_best, config.keep_every),
            continue_on_error=config.on_save_error == "continue",
            reporter=reporter,
        )
        self.store = store
        if point is not None:
            session.iters = point.iters
            reporter.note(f"continuing run {session.recorder.run_id} from iteration {point.iters} ({point.path})")
            store.deliver_again()
        self._summary = TrainSummary(session.run_id, self._mlflow.client.tracking_uri, journal.directory)
        stop = self._context.stop
        stop.resume_ref, stop.on_leave = session.run_id or str(journal.directory), self._mark_left

    def _mark_left(self) -> None:
        """Set the run's status when a second signal ends this process; the journal keeps what has not been sent."""
        session, opened = self._session, self._opened
        if session is None or opened is None or session.run_id is None or session.delivery.reason:
            return  # there is no run, or MLflow does not answer
        status = session.status if self._has_ended else "KILLED"
        for run_id in (session.run_id, opened.wrapper_run.target.run_id if opened.wrapper_run is not None else None):
            if run_id is not None:
                self._mlflow.client.set_terminated(run_id, status)

    def _fail_wrapper_if_lost(self, wrapper_run: WrapperRun) -> None:
        if self._session is not None and self._session.lost is not None:
            wrapper_run.status = "FAILED"

    def require_kept(self) -> None:
        """Raise LostLeaseError if another process has taken the run; once everything else has ended."""
        if self._session is not None and self._session.lost is not None:
            raise self._session.lost

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the training loop: sample the machine, and note how far the run has come, however the loop ends."""
        if self._session is None:
            yield
            return
        state, sink = self._prepared.state, self.metrics
        begun = state.iters

        def iters() -> int:
            """Return the iteration; the first one until there are results, which the UI wants logged first."""
            return state.iters if isinstance(sink, TrackedMetrics) and sink.has_logged else begun

        try:
            with ExitStack() as watching:
                if not self._request.no_system_metrics:
                    watching.enter_context(SystemMetrics(self._session.recorder, iters))
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
            self._context.reporter.warn(
                f"{counted(unreadable, 'unreadable file was', 'unreadable files were')} skipped"
            )
            self.metrics.log({"data/unreadable_files": unreadable}, result.iters)
        if was_complete:
            self._context.reporter.note("nothing is left to train")
            if best:
                self.metrics.log(best_metrics(best), 0)
        self._has_ended = True
        if result.stopped_by is not None:
            self._session.status = "KILLED"
            if self._opened is not None and self._opened.wrapper_run is not None:
                self._opened.wrapper_run.status = "KILLED"
        if self._session.ended is None:
            self._session.record(describe_in_words(self._plan, result_in_words(result, best, config.total_iters)))
        if result.stopped_by is None and not self._request.no_log_models:
            self._session.record(LogModels())

    def summary(self) -> TrainSummary:
        """Return what the run left behind, once it has ended."""
        if self._session is None or self._opened is None:
            return self._summary
        error = self._session.delivery.error
        return replace(
            self._summary,
            run_id=self._session.run_id,
            run_name=self._opened.name,
            experiment_id=self._opened.experiment_id,
            pending=self._session.journal.pending,
            refused=self._session.refused,
            restoring=error.command if isinstance(error, DeletedError) else "",
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
            return run_folder(Path(DEFAULT_SAVE_ROOT), point.run_id)
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
