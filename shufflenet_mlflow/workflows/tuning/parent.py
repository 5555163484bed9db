"""The MLflow run of a study: the parent of its trials' runs, written by one of the workers at a time."""

import json
from contextlib import ExitStack
from typing import Any

from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.lease import Lease
from shufflenet_mlflow.tracking.messages import MetricPoints, Params, Tags, TextArtifact, now_ms
from shufflenet_mlflow.tracking.names import (
    DECISIONS_FILE,
    FIGURES_FOLDER,
    REPEATS_SECTION,
    STUDY_BEST_TAG,
    STUDY_PLAN_TAG,
    STUDY_SECTION,
    STUDY_STATE_TAG,
    STUDY_SUMMARY_FILE,
    STUDY_TAG,
)
from shufflenet_mlflow.tracking.note import Note, indented
from shufflenet_mlflow.tracking.run import new_run, take_mlflow_run_id
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.parent_run import OpenedParent, open_parent
from shufflenet_mlflow.workflows.training.turn import Turn
from shufflenet_mlflow.workflows.tuning.board import PARENT, Board
from shufflenet_mlflow.workflows.tuning.report import StudyReport
from shufflenet_mlflow.workflows.tuning.request import TuneRequest


class ParentRun:
    """The run of a study, opened by the worker that leads; a context manager, which ends the run."""

    def __init__(self, request: TuneRequest, board: Board, store: Connection, context: JobContext) -> None:
        self._request, self._board, self._mlflow, self._context = request, board, store, context
        self._closing = ExitStack()
        self._session: TrackingSession | None = None
        self._points = 0
        self._told: dict[str, str] = {}

    def __enter__(self) -> "ParentRun":
        with ExitStack() as undo:
            journal = Journal(self._request.folder)
            undo.callback(journal.close)
            lease = Lease()
            opened = self._open(journal, Turn(lease, True, self._context))
            session = TrackingSession(
                self._mlflow.client,
                journal,
                opened.run,
                MESSAGE_KINDS,
                is_new=opened.is_new,
                lease=lease,
                reporter=self._context.reporter,
                stop=self._context.stop,
            )
            undo.pop_all()
        self._session = self._closing.enter_context(session)
        session.record(*opened.first_messages, Params.of(self._params()), Tags({STUDY_TAG: self._request.study}))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.__exit__(*exception)

    def _open(self, journal: Journal, turn: Turn) -> OpenedParent:
        tags = {STUDY_TAG: self._request.study, STUDY_PLAN_TAG: self._board.plan.to_json()}
        known = self._board.attributes().get(PARENT)
        return open_parent(
            self._mlflow,
            journal,
            new_run(experiment=self._request.experiment, name=self._request.study, tags=tags),
            tags,
            turn,
            known=None if known is None else str(known),
            mlflow_run_id=take_mlflow_run_id(),
            note=lambda run: self._board.set_attribute(PARENT, run),
        )

    def _params(self) -> dict[str, Any]:
        plan = self._board.plan
        named = ("trials", "rungs", "reduction", "sampler", "generation", "asynchronous", "metric", "direction")
        return {
            **{f"study.{name}": getattr(plan, name) for name in named},
            **{f"space.{param.name}": param.spec for param in plan.space},
            **plan.options,
        }

    @property
    def run_id(self) -> str | None:
        """The run's ID; None until MLflow has created it."""
        return None if self._session is None else self._session.run_id

    @property
    def pending(self) -> int:
        """Entries that have not reached MLflow."""
        return 0 if self._session is None else self._session.journal.pending

    def stopped(self) -> None:
        """End the run as KILLED: the study has been stopped."""
        if self._session is not None:
            self._session.status = "KILLED"

    def failed(self) -> None:
        """End the run as FAILED: no trial could be trained."""
        if self._session is not None:
            self._session.status = "FAILED"

    def tell(self, report: StudyReport, *, figures: bool = False) -> None:
        """Send how far the study has come; what has been sent before is not sent again.

        Args:
            figures: draw the figures, too, which takes seconds.
        """
        session = self._session
        if session is None:
            return
        self._note_own_id()
        history = report.history()
        for step in range(self._points, len(history)):
            session.record(MetricPoints({f"{STUDY_SECTION}best_at_rung_1": history[step]}, step + 1, now_ms()))
        self._points = len(history)
        best = report.to_dict()["best"]
        tags = {STUDY_STATE_TAG: report.progress()}
        if best is not None:
            tags[STUDY_BEST_TAG] = json.dumps({name: best[name] for name in ("number", "value", "run_id", "params")})
        self._tell_once("tags", json.dumps(tags), Tags(tags))
        note = _note(report)
        self._tell_once("note", note.text, note)
        if figures:
            self._tell_once(DECISIONS_FILE, report.decisions(), TextArtifact(DECISIONS_FILE, report.decisions()))
            document = TextArtifact.of_json(STUDY_SUMMARY_FILE, report.to_dict())
            self._tell_once(STUDY_SUMMARY_FILE, document.text, document)
            if report.is_complete and (spread := report.spread()):
                name = plan_name(report)
                values = {f"{name}/{key}": value for key, value in spread.items()}
                session.record(MetricPoints(values, 0, now_ms()))
            for name, text in report.figures().items():
                self._tell_once(name, text, TextArtifact(f"{FIGURES_FOLDER}/{name}", text))
            if best is not None and report.is_complete and best["value"] is not None:
                session.record(MetricPoints({f"{STUDY_SECTION}best": best["value"]}, 0, now_ms()))

    def _tell_once(self, key: str, text: str, message: Message) -> None:
        if self._session is not None and self._told.get(key) != text:
            self._told[key] = text
            self._session.record(message)

    def _note_own_id(self) -> None:
        """Note the run's ID in the record once MLflow has created it, for workers on other machines."""
        run_id = self.run_id
        if run_id is not None and self._told.get(PARENT) != run_id:
            self._told[PARENT] = run_id
            self._board.set_attribute(PARENT, run_id)


def plan_name(report: StudyReport) -> str:
    """Return the section of the metrics of repeated trainings, such as `repeats/top1`."""
    return f"{REPEATS_SECTION}{report.plan.metric.rpartition('/')[2]}"


def _note(report: StudyReport) -> Note:
    plan, best = report.plan, report.best
    if plan.repeats:
        return _note_of_repeats(report)
    lines = [
        f"**Study {report.name}**: {plan.trials} trials on {plan.rungs} rungs, one of {plan.reduction} goes on; "
        f"{plan.sampler}, {plan.direction} {plan.metric}"
    ]
    if best is not None:  # first: MLflow's page shows little of a long description
        value, rung = best.values[max(best.values)], max(best.values) + 1
        shown = ", ".join(f"{name} {setting}" for name, setting in best.params.items())
        lines.append(f"**Best:** trial {best.number} with {plan.metric} {value:.4f} at rung {rung} ({shown})")
        lines.append(indented(report.command() or ""))
    lines.append(f"**Progress:** {report.progress()}")
    if shares := report.importance() if report.is_complete else {}:
        lines.append("**Importance:** " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    lines.append("\n".join(f"- `{param.name}` = `{param.spec}`" for param in plan.space))
    return Note.of(*lines)


def _note_of_repeats(report: StudyReport) -> Note:
    lines = [
        f"**{counted(report.plan.trials, 'training')}** that differ in nothing but the seed",
        f"**Progress:** {report.progress()}",
    ]
    if spread := report.spread():
        lines.append(f"**{report.plan.metric}** {spread['mean']:.4f} ± {spread['std']:.4f} (mean, standard deviation)")
    return Note.of(*lines)
