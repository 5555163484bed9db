"""`shufflenet tune`: a study of many trainings, of which the best go on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from shufflenet_mlflow.errors import ConfigError, StudyError, TrackingError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import PARENT, StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.runtime.watching import watching
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal_file import is_created
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.workflows.tune_delivery import deliver_rest, with_runs
from shufflenet_mlflow.workflows.tuning.board import BEGUN_ANEW, EXPERIMENT, STOP, Board
from shufflenet_mlflow.workflows.tuning.board import PARENT as PARENT_ATTRIBUTE
from shufflenet_mlflow.workflows.tuning.claims import Claims
from shufflenet_mlflow.workflows.tuning.report import StudyReport
from shufflenet_mlflow.workflows.tuning.request import TuneRequest
from shufflenet_mlflow.workflows.tuning.restoring import Remains, remains_of
from shufflenet_mlflow.workflows.tuning.trial import Trials, with_fixed_length
from shufflenet_mlflow.workflows.tuning.worker import Worker

HELPER_VARIABLE = "_TUNE_HELPER_OF"
"""Set for the processes that a command starts to train several trials at a time: the command's process ID."""
LONGEST_PLAN = 5000
"""Characters that MLflow accepts in a tag."""


@dataclass(frozen=True)
class TuneSummary:
    """A study as this command leaves it."""

    report: StudyReport
    stopped_by: int | None = None
    """The signal that ended the command."""
    reason: str = ""
    """Why it has ended before the study was complete, without a signal."""
    pending: int = 0
    """Entries of the study's run and of its trials that have not reached MLflow."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `tune --json`."""
        return {**self.report.to_dict(), "pending": self.pending}


def run_tune(request: TuneRequest, *, reporter: Reporter, stop: StopFlag) -> TuneSummary:
    """Begin a study, or go on with one, until it is complete.

    Raises:
        ConfigError: the study was begun otherwise, or its options cannot work.
        StudyError: there is no such study, its record cannot be used, or no trial could be trained.
        ShuffleNetError: a training failed for a reason that is no matter of its options.
        StopRequested: a signal arrived before there was a study.
    """
    prepare_environment()
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "a study's trials train in one process each; start `shufflenet tune` without torchrun, once for each GPU",
            code="tune-distributed",
        )
    request = replace(request, is_helper=HELPER_VARIABLE in os.environ)
    with stop.at_once():
        board, remains = _find_or_begin(request, reporter, stop)
    if board.attributes().get(STOP) and not request.is_helper:
        board.set_attribute(STOP, False)
    request = replace(request, experiment=request.experiment or board.attributes().get(EXPERIMENT))
    trials = Trials(request, board.plan, reporter, stop)
    worker = Worker(request, board, trials, reporter, stop, remains)
    with _ended_with_command(request), _helpers(request, board, reporter):
        worker.work()
    pending = 0 if request.is_helper else deliver_rest(request, board, reporter, stop)
    report = _with_checkpoint(worker.report(), request)
    reason = "stopped by `tune stop`" if worker.stopped_by_command else "time is over" if worker.out_of_time else ""
    if report.is_complete and report.best is None and not request.is_helper:
        failure = next((trial.failure for trial in report.trials if trial.failure), "")
        count = counted(len(report.trials), "trial")
        raise StudyError(
            f"none of the {count} of study {request.study!r} could be trained: {failure}",
            code="study-all-failed",
        )
    return TuneSummary(report, None if reason else stop.signum, reason, pending)


def _find_or_begin(request: TuneRequest, reporter: Reporter, stop: StopFlag) -> tuple[Board, Remains | None]:
    """Return the record of the study: the one in its storage, one restored from MLflow, or a new one."""
    board = Board.find(request.study, request.storage, request.folder)
    if board is not None:
        board.move(_asked(request, board, reporter, stop))
        return board, None if board.attributes().get(BEGUN_ANEW) else _remains(request, reporter)
    remains = _remains(request, reporter)
    if remains is not None:
        reporter.note(
            f"study {request.study!r} goes on from what MLflow knows: {counted(len(remains.params), 'trial')}"
        )
        known = {PARENT_ATTRIBUTE: remains.run_id, EXPERIMENT: remains.experiment}
        board = Board.create(request.study, request.storage, request.folder, remains.plan, known, anew=False)
        board.move(_asked(request, board, reporter, stop))
        return board, remains
    if request.plan is None:
        raise _unknown(request)
    plan = with_fixed_length(Trials(request, request.plan, reporter, stop))
    if len(plan.to_json()) > LONGEST_PLAN:
        raise ConfigError(
            f"--param and the options of training take more than {LONGEST_PLAN} characters; list fewer values",
            code="study-plan-long",
        )
    known = {} if request.experiment is None else {EXPERIMENT: request.experiment}
    return Board.create(request.study, request.storage, request.folder, plan, known, anew=True), None


def _remains(request: TuneRequest, reporter: Reporter) -> Remains | None:
    """Return what MLflow knows of the study; None if it knows nothing, or is away and a new study can begin."""
    try:
        return remains_of(Connection(request.tracking_uri), request.study, request.experiment)
    except TrackingError as error:
        if request.plan is None:
            raise
        reporter.warn(f"{error}; whether the study has begun elsewhere is not known")
        return None


def _asked(request: TuneRequest, board: Board, reporter: Reporter, stop: StopFlag) -> Any:
    """Return the plan that the command asks for, with the length that the study has; None without one."""
    if request.plan is None:
        return None
    length = {name: board.plan.options[name] for name in ("epochs", "total_iters") if name in board.plan.options}
    given = request.plan.options.keys() & {"epochs", "total_iters"}
    return request.plan if given else replace(request.plan, options={**request.plan.options, **length})


def show_study(request: TuneRequest) -> StudyReport:
    """Return a study as it stands: from its storage, or else from what MLflow knows.

    Raises:
        StudyError: neither knows it.
        TrackingError: MLflow does not answer.
    """
    prepare_environment()
    board = Board.find(request.study, request.storage, request.folder)
    if board is not None:
        parent = board.attributes().get(PARENT_ATTRIBUTE)
        run_id = str(parent) if parent is not None and is_created(str(parent)) else None
        at_work = Claims(board.storage, board.name, board.name).tasks()
        training = frozenset(int(task.split()[0]) for task in at_work if task.split()[0].isdecimal())
        report = StudyReport(board.name, board.plan, tuple(board.trials()), run_id, training=training)
        return _with_checkpoint(report, request)
    remains = remains_of(Connection(request.tracking_uri), request.study, request.experiment)
    if remains is None:
        raise _unknown(request)
    trials = tuple(remains.trials())
    return _with_checkpoint(StudyReport(request.study, remains.plan, trials, remains.run_id), request)


def stop_study(request: TuneRequest) -> StudyReport:
    """Ask all workers of a study to save their checkpoints and stop; the study can be gone on with.

    A study that is complete has none, and is left alone.

    Raises:
        StudyError: the storage does not know it.
    """
    board = Board.find(request.study, request.storage, request.folder)
    if board is None:
        raise _unknown(request)
    report = StudyReport(board.name, board.plan, tuple(board.trials()))
    if not report.is_complete:
        board.set_attribute(STOP, True)
    return report


def _unknown(request: TuneRequest) -> StudyError:
    where = str(request.folder) if request.storage is None else redact(request.storage)
    return StudyError(
        f"there is no study {request.study!r}, neither in {where!r} nor in MLflow; --param begins one",
        code="study-unknown",
    )


def _with_checkpoint(report: StudyReport, request: TuneRequest) -> StudyReport:
    report = with_runs(report, request)
    best = report.best
    if best is None:
        return report
    reference = best.run_id or str(request.trial_folder(best.number))
    return replace(report, checkpoint=reference)


@contextmanager
def _helpers(request: TuneRequest, board: Board, reporter: Reporter) -> Iterator[None]:
    """Within the block, have other processes of this machine work on the study, too."""
    count = (request.max_parallel or board.plan.max_parallel) - 1
    if request.is_helper or count < 1:
        yield
        return
    words = ["tune", "--study", request.study, "--save-dir", str(request.folder), "--max-parallel", "1", "--json"]
    given = {
        "--experiment": request.experiment,
        "--cache-dir": request.cache_dir,
        "--grace": request.grace,
    }
    for name, value in given.items():
        words += [] if value is None else [name, str(value)]
    words += ["--no-system-metrics"] * request.no_system_metrics
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHUFFLENET_")}
    environment |= {HELPER_VARIABLE: str(os.getpid())}
    if "SHUFFLENET_CACHE_DIR" in os.environ:
        environment["SHUFFLENET_CACHE_DIR"] = os.environ["SHUFFLENET_CACHE_DIR"]
    if request.storage is not None:
        environment["SHUFFLENET_STORAGE"] = request.storage  # not on the command line, which others can read
    if request.tracking_uri is not None:
        environment["SHUFFLENET_TRACKING_URI"] = request.tracking_uri
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", "shufflenet_mlflow", *words]
    helpers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: S603
        for _ in range(count)
    ]
    try:
        yield
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        for helper in helpers:
            status = helper.wait()
            if status not in (0, 143, 130):
                reporter.warn(f"a helper of the study ended with status {status}")


@contextmanager
def _ended_with_command(request: TuneRequest) -> Iterator[None]:
    """Within the block, a helper sends itself SIGTERM once the command that started it is gone."""
    if not request.is_helper:
        yield
        return

    def end_if_gone() -> bool:
        if os.getppid() == PARENT and str(PARENT) == os.environ[HELPER_VARIABLE]:
            return False
        import signal

        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with watching(end_if_gone, seconds=0.5, name="watching the command"):
        yield
