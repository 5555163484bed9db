"""Open the MLflow run of a command that has runs below it: of a study, or of a search."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.client import MAY_PASS
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import is_created, new_provisional_id
from shufflenet_mlflow.tracking.messages import Create, Reopen
from shufflenet_mlflow.tracking.run import make_run, reopen_run, tags_for_mlflow_run
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.uris import is_server, stored_uri
from shufflenet_mlflow.workflows.training.turn import Turn


@dataclass(frozen=True)
class OpenedParent:
    """The run to write to."""

    run: str
    """Its ID, or its provisional ID until MLflow creates it."""
    first_messages: tuple[Message, ...] = ()
    """Messages that go first, once the server answers."""
    is_new: bool = False


def open_parent(
    store: Connection,
    journal: Journal,
    create: Create,
    tags: Mapping[str, str],
    turn: Turn,
    *,
    known: str | None,
    mlflow_run_id: str | None,
    note: Callable[[str], object],
) -> OpenedParent:
    """Open a run that is known, that `mlflow run` created, or a new one; while the server is away, provisionally.

    Args:
        create: creates the run.
        tags: those of its tags that are set again on a known run.
        known: the run's ID, or its provisional ID, as it was last noted; None before there was one.
        mlflow_run_id: the run that `mlflow run` created for this process.
        note: keeps the run's ID, before the run is created: it is found again whatever happens.

    Raises:
        ResumeError: another process writes to the run.
        TrackingError: the store refuses.
    """
    if known is None:
        known = mlflow_run_id or new_provisional_id()
        note(known)
    known = journal.run_id_of(known)
    try:
        with store.impatient():
            if not is_created(known):
                mark = known
                if not journal.pending:
                    journal.set_owner(mark, stored_uri(store.uri))
                claimed = {**create.tags, **turn.lease.claim(None)}
                known, is_new = make_run(store.client, replace(create, tags=claimed), mark=mark, is_first=False)
                journal.bind(mark, known)
                note(known)
                if is_new:
                    return OpenedParent(mark, (), True)
                turn.lease.unclaim()
            if known == mlflow_run_id:
                tags = {**tags, **tags_for_mlflow_run(create.name, tags)}
            claim = turn.take(store.client, known)
            reopen_run(store.client, known, {**tags, **claim})
            return OpenedParent(_owner(journal, known), (Reopen(tags),))
    except TrackingError as error:
        if error.answered or not (is_server(store.uri) or error.mlflow_code == MAY_PASS):
            raise
        turn.lease.unclaim()
        turn.context.reporter.warn(f"{error}; work goes on; what belongs to MLflow is kept and sent later")
        first: Message = Reopen(tags) if is_created(known) else create
        return OpenedParent(_owner(journal, known), (first,))


def _owner(journal: Journal, run_id: str) -> str:
    """Return the provisional ID by which the journal knows a run, if it does."""
    return next((mark for mark, bound in journal.bound.items() if bound == run_id), run_id)
