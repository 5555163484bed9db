"""The runs of a search in MLflow: one for the search, and below it one for each of the best candidates."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.writing import Monitor, prepare_checkpoint, write_prepared
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.files import new_folder
from shufflenet_mlflow.runtime.serialization import to_json
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import new_provisional_id
from shufflenet_mlflow.tracking.lease import Lease
from shufflenet_mlflow.tracking.messages import Finish, MetricPoints, Params, Tags, TextArtifact, now_ms, to_body
from shufflenet_mlflow.tracking.names import (
    ARCHITECTURE_FILE,
    CANDIDATES_FILE,
    FIGURES_FOLDER,
    LATENCY_FILE,
    NETWORK_TAG,
    PARENT_RUN_TAG,
    PARETO_FILE,
    SEARCH_BEST_TAG,
    SEARCH_SECTION,
    SEARCH_STATE_TAG,
    SEARCH_TAG,
    TRUST_FILE,
)
from shufflenet_mlflow.tracking.note import Note, indented
from shufflenet_mlflow.tracking.run import new_run, take_mlflow_run_id
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.uris import stored_uri
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.parent_run import open_parent
from shufflenet_mlflow.workflows.searching.evolution import Scored
from shufflenet_mlflow.workflows.searching.report import SearchReport, best_tag, in_words, train_command
from shufflenet_mlflow.workflows.searching.request import SearchRequest, best_folder
from shufflenet_mlflow.workflows.training.turn import Turn


class SearchRun:
    """The run of a search; a context manager, which ends the run.

    Args:
        journal: of the search's folder; closed at the end.
        name: of a new run.
        tags: of the run.
    """

    def __init__(
        self,
        request: SearchRequest,
        journal: Journal,
        store: Connection,
        context: JobContext,
        *,
        name: str,
        tags: Mapping[str, str],
    ) -> None:
        lease = Lease()
        opened = open_parent(
            store,
            journal,
            new_run(experiment=request.experiment, name=name, tags=tags),
            tags,
            Turn(lease, True, context),
            known=journal.run,
            mlflow_run_id=take_mlflow_run_id(),
            note=lambda run: _note_owner(journal, run, store.uri),
        )
        self._session = TrackingSession(
            store.client,
            journal,
            opened.run,
            MESSAGE_KINDS,
            is_new=opened.is_new,
            lease=lease,
            reporter=context.reporter,
            stop=context.stop,
        )
        self._first = opened.first_messages
        self._told: dict[str, str] = {}
        self._closing = ExitStack()

    def __enter__(self) -> "SearchRun":
        session = self._closing.enter_context(self._session)
        session.record(*self._first)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.__exit__(*exception)

    @property
    def run(self) -> str:
        """The run's ID, or its provisional ID until MLflow has created it."""
        return self._session.run_id or self._session.run

    @property
    def run_id(self) -> str | None:
        """The run's ID; None until MLflow has created it."""
        return self._session.run_id

    def describe(self, report: SearchReport) -> None:
        """Send what the search does."""
        plan = {f"search.{name}": value for name, value in report.plan.to_dict().items()}
        self._session.record(Params.of({**plan, **report.sizes}))

    def tell(self, report: SearchReport) -> None:
        """Send how far the search has come; what has been sent before is not sent again."""
        tags = {SEARCH_STATE_TAG: report.progress()}
        if report.best is not None:
            tags[SEARCH_BEST_TAG] = best_tag(report.best)
        self._once("tags", str(tags), Tags(tags))
        note = report.note()
        self._once("note", note.text, note)
        history = report.best_by_generation()
        complete = len(history) if report.is_complete else len(history) - 1
        for generation, score in enumerate(history[: max(0, complete)]):
            points = MetricPoints({f"{SEARCH_SECTION}best_score": score}, generation, now_ms())
            self._once(f"generation {generation}", str(score), points)

    def tell_end(self, report: SearchReport, figures: Mapping[str, str]) -> None:
        """Send the result: candidates, architecture and figures."""
        best = report.best
        if best is not None:
            values = {f"{SEARCH_SECTION}score": best.score, f"{SEARCH_SECTION}macs": float(best.macs)}
            self._session.record(
                TextArtifact.of_json(ARCHITECTURE_FILE, report.architecture(best)), MetricPoints(values, 0, now_ms())
            )
        if report.front:
            self._session.record(TextArtifact.of_json(PARETO_FILE, report.pareto()))
        self._session.record(TextArtifact(CANDIDATES_FILE, report.lines()))
        if report.measured is not None:
            self._session.record(
                TextArtifact.of_json(LATENCY_FILE, report.measured.to_dict()),
                MetricPoints({f"{SEARCH_SECTION}latency_error": report.measured.error}, 0, now_ms()),
            )
        if report.trust is not None:
            self._session.record(TextArtifact(TRUST_FILE, report.trust.lines()))
            seed = report.plan.seed
            agreement = {f"{SEARCH_SECTION}{name}": value for name, value in report.trust.metrics(seed).items()}
            if agreement:
                self._session.record(MetricPoints(agreement, 0, now_ms()))
        self._session.record(*(TextArtifact(f"{FIGURES_FOLDER}/{name}", text) for name, text in figures.items()))

    def _once(self, key: str, text: str, message: Message) -> None:
        if self._told.get(key) != text:
            self._told[key] = text
            self._session.record(message)


def _note_owner(journal: Journal, run: str, uri: str) -> None:
    """Note the run's provisional ID in its journal; its ID stands there once it is bound."""
    if journal.run is None:
        journal.set_owner(run, stored_uri(uri))
        journal.sync()


@dataclass(frozen=True)
class BestCandidates:
    """Writes the folders of the best candidates, or of the front: each with checkpoint and journal.

    Args:
        constants: entries of every checkpoint: network, preprocessing, classes, configuration.
        state_dict: returns a candidate's inherited weights with BN statistics of its own.
    """

    request: SearchRequest
    folder: Path
    report: SearchReport
    parent: str
    """The search's run, by its ID or provisional ID."""
    uri: str
    iters: int
    """Iterations of the supernet's training."""
    constants: Callable[[Scored], Mapping[str, Any]]
    state_dict: Callable[[Scored], Mapping[str, Any]]

    def write(self, rank: int, scored: Scored) -> None:
        """Write the folder of a candidate, whole or not at all, unless it is there.

        Raises:
            CheckpointError: its checkpoint cannot be written.
        """
        folder = best_folder(self.folder, rank, of_front=self.report.plan.pareto)
        if folder.exists():
            return
        with new_folder(folder) as aside:
            monitor = Monitor(f"{SEARCH_SECTION}score", scored.score, "max")
            state = {**self.constants(scored), "state_dict": self.state_dict(scored)}
            manifest = write_prepared(prepare_checkpoint(state, self.iters, monitor=monitor), aside).manifest
            architecture = self.report.architecture(scored)
            (aside / ARCHITECTURE_FILE).write_text(to_json(architecture))
            values = {f"{SEARCH_SECTION}score": scored.score, f"{SEARCH_SECTION}macs": float(scored.macs)}
            if self.report.latency is not None:
                values[f"{SEARCH_SECTION}latency_ms"] = self.report.latency.ms(scored.genes)
            self._keep(
                aside,
                self._create(rank, scored),
                Params.of({"model": architecture["model"], **scored.options, **self.report.sizes}),
                TextArtifact.of_json(ARCHITECTURE_FILE, architecture),
                _note(self._called(rank), scored),
                Checkpoint.of(manifest, metrics=values),
                Finish("FINISHED", now_ms(), self.iters),
            )

    def _called(self, rank: int) -> str:
        return f"{'front' if self.report.plan.pareto else 'rank'} {rank}"

    def _create(self, rank: int, scored: Scored) -> Message:
        tags = {
            PARENT_RUN_TAG: self.parent,
            SEARCH_TAG: self._called(rank),
            SEARCH_BEST_TAG: best_tag(scored),
            NETWORK_TAG: str(self.report.architecture(scored)["model"]),
        }
        cost = f"{scored.macs / 1e6:,.2f} M"
        if self.report.plan.pareto:
            cost = self.report.cost_in_words(scored)
        name = f"{self._called(rank)}: {scored.score:.4f}, {cost}"
        return new_run(experiment=self.request.experiment, name=name, tags=tags)

    def _keep(self, folder: Path, *messages: Message) -> None:
        journal, mark = Journal(folder), new_provisional_id()
        try:
            journal.set_owner(mark, stored_uri(self.uri))
            for message in messages:
                journal.append(mark, message.kind, to_body(message))
        finally:
            journal.close()


def _note(called: str, scored: Scored) -> Note:
    return Note.of(
        f"**{called.capitalize()}** of a search: {in_words(scored)}, with weights of the supernet",
        indented(train_command(scored)),
    )
