"""The runs of a study and of its trials: deliver what they have yet to be told, and find out their IDs."""

from contextlib import suppress
from dataclasses import replace

from shufflenet_mlflow.errors import JournalError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.workflows.delivering import deliver_folders
from shufflenet_mlflow.workflows.tuning.board import Board
from shufflenet_mlflow.workflows.tuning.halving import Trial
from shufflenet_mlflow.workflows.tuning.report import StudyReport
from shufflenet_mlflow.workflows.tuning.request import TuneRequest


def deliver_rest(request: TuneRequest, board: Board, reporter: Reporter, stop: StopFlag) -> int:
    """Send what waits in the study's folders; see `deliver_folders`."""
    folders = [request.folder, *(request.trial_folder(trial.number) for trial in board.trials())]
    return deliver_folders(folders, request.tracking_uri, reporter, stop)


def with_runs(report: StudyReport, request: TuneRequest) -> StudyReport:
    """Return the report with the runs that MLflow has created since the trials were recorded."""

    def completed(trial: Trial) -> Trial:
        if trial.run_id is None:
            with suppress(JournalError):
                return replace(trial, run_id=read_pending(request.trial_folder(trial.number)).run_id)
        return trial

    return replace(report, trials=tuple(map(completed, report.trials)))
