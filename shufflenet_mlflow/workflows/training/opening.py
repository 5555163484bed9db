"""Open the run that a training writes to: the resumed one, that of `mlflow run`, or a new one."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.config import RunConfig
from shufflenet_mlflow.data.datasets import data_name
from shufflenet_mlflow.errors import ResumeError, TrackingError
from shufflenet_mlflow.runtime.launchers import attempt as attempts_before
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import MAY_PASS, mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import FolderLease, is_created, new_provisional_id
from shufflenet_mlflow.tracking.lifecycle import require_active_run
from shufflenet_mlflow.tracking.messages import Create, Reopen
from shufflenet_mlflow.tracking.names import CONTINUES_TAG, PARENT_RUN_TAG
from shufflenet_mlflow.tracking.run import (
    WrapperRun,
    config_to_begin_with,
    find_marked_run,
    is_unplaced,
    make_run,
    new_run,
    project_tags,
    reopen_run,
    require_not_beyond,
    tags_for_mlflow_run,
    take_mlflow_run_id,
)
from shufflenet_mlflow.tracking.target import Message, RunTarget
from shufflenet_mlflow.tracking.uris import is_server, stored_uri
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.description import (
    config_digest,
    first_tags,
)
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.turn import Turn

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient


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
    ended: int | None = None
    """When it had ended before, in milliseconds since the epoch, if nothing is left to train."""


def open_run(
    store: Connection,
    request: TrainRequest,
    attempt: Attempt,
    plan: Plan,
    drift: Mapping[str, tuple[Any, Any]],
    journal: Journal | None,
    turn: Turn,
) -> OpenedRun:
    """Open the resumed run, the one that `mlflow run` created, or a new one; while the server is away, provisionally.

    Args:
        drift: what has changed since the resume point was written: name -> (then, now).
        turn: takes the run, once its last writer is gone.

    Raises:
        ResumeError: another process trains the run, it has gone on beyond the checkpoint, or no longer exists.
        TrackingError: the store refuses.
    """
    mlflow_run_id = take_mlflow_run_id()
    known = _run_to_continue(attempt, journal, plan.config)
    is_continued = known is not None and attempt.own_point is not None
    tags = {**first_tags(attempt, plan.config, drift, is_continued=is_continued), **request.tags}
    name = request.run_name or f"{plan.config.model} {data_name(plan.config.train_dir)} {plan.config.input_size}px"
    first: Create | Reopen
    if known is not None:
        first = Reopen(tags)
    elif mlflow_run_id is not None and (made := _made_unplaced(store, mlflow_run_id)) is not None:
        known = made.get(CONTINUES_TAG)  # of an attempt in another container
        first = new_run(experiment=request.experiment, name=name, tags={**project_tags(made), **tags})
        first = first if known is None else Reopen(tags)
    elif mlflow_run_id is not None:
        known, first = mlflow_run_id, Reopen(tags_for_mlflow_run(request.run_name, tags))
    else:
        first = _new_run(request, name, tags, turn.context.reporter)
    if known is not None and not is_created(known):  # the journal has yet to create it
        return OpenedRun(known, (first,), name=name)
    noted = _noted_mark(journal, plan.config)
    mark = noted or new_provisional_id()
    try:
        with store.impatient():
            unstarted = _find_unstarted_run(store.client, attempt, journal, plan.config)
            if unstarted is None and known is None and noted is not None and isinstance(first, Create):
                unstarted = find_marked_run(store.client, first, noted)
            if unstarted is not None:
                known, first = unstarted, Reopen(tags)
            if known is None and noted is None:
                _note_mark(mark, attempt, plan.config, journal, store.uri, turn)
            opened = _open_now(store.client, known, first, attempt, mlflow_run_id, turn, mark, plan.config.total_iters)
            # What an earlier attempt has left in the journal, such as its end, is sent only now.
            again = first if isinstance(first, Reopen) and journal is not None and journal.pending else None
            return opened if again is None else replace(opened, first_messages=(again,))
    except TrackingError as error:
        if error.answered or not (is_server(store.uri) or error.mlflow_code == MAY_PASS):
            raise
        turn.lease.unclaim()
        turn.context.reporter.warn(f"{error}; training goes on; what belongs to MLflow is kept and sent later")
        if known is None and (unstarted := _remembered_run(attempt, journal, plan.config)) is not None:
            known, first = unstarted, Reopen(tags)
    return OpenedRun(known or mark, (first,), name=name)


def _made_unplaced(store: Connection, mlflow_run_id: str) -> Mapping[str, str] | None:
    """Return the tags of the run that `mlflow run` made, if another one is to take its place.

    `mlflow run` makes its runs in `Default` unless it is told otherwise. A run cannot be moved, so another one is
    created where all others are.
    """
    with suppress(TrackingError), store.impatient():
        if is_unplaced(store.client, mlflow_run_id):
            tags: Mapping[str, str] = store.client.get_run(mlflow_run_id).data.tags
            return tags
    return None


def _new_run(request: TrainRequest, name: str, tags: dict[str, str], reporter: Reporter) -> Create:
    """Return the message that creates the run, below the caller's active one if there is one."""
    parent = request.parent
    if parent is None:
        return new_run(experiment=request.experiment, name=name, tags=tags)
    if not request.tags:  # a script's, which may not know
        reporter.note(f"the new run is a child of the active run {parent.run_id}")
    create = new_run(experiment=request.experiment, name=name, tags={**tags, PARENT_RUN_TAG: parent.run_id})
    if request.experiment or not parent.experiment_id:
        return create
    return replace(create, experiment_id=parent.experiment_id)


def _note_mark(mark: str, attempt: Attempt, config: RunConfig, journal: Journal | None, uri: str, turn: Turn) -> None:
    """Note the mark of the run that is about to be created: this process may be killed before it learns the run's ID.

    A journal that is another run's, as for a fork in its parent's folder, is left as it is.
    """
    if journal is None or journal.pending or (attempt.is_fork and journal.run is not None):
        return
    journal.set_owner(mark, stored_uri(uri))
    journal.note_lease(FolderLease(turn.lease.token, config_digest(config.to_dict()), turn.lease.iters, taken=False))
    journal.sync()


def _is_only_marked(journal: Journal) -> bool:
    """Whether a process was killed while it created the journal's run, whose ID is therefore not known."""
    return journal.run is not None and not journal.pending and not is_created(journal.run_id_of(journal.run))


def _noted_mark(journal: Journal | None, config: RunConfig) -> str | None:
    """Return the mark of a run that a killed process was creating here, with this configuration; see `_note_mark`."""
    if journal is None or not _is_only_marked(journal):
        return None
    same = journal.lease is not None and journal.lease.config == config_digest(config.to_dict())
    return journal.run if same or attempts_before() else None


def _run_to_continue(attempt: Attempt, journal: Journal | None, config: RunConfig) -> str | None:
    """Return the run, or its provisional ID, that an earlier attempt has written to; None for another run."""
    owner = journal.run if journal is not None and not _is_only_marked(journal) else None
    if attempt.resume_point is not None:
        return None if attempt.is_fork else attempt.resume_point.run_id or owner
    if journal is not None and owner and not is_created(journal.run_id_of(owner)):  # MLflow was away then, too
        return owner if attempts_before() or _remembered_run(attempt, journal, config) else None
    return None


def _remembered_run(attempt: Attempt, journal: Journal | None, config: RunConfig) -> str | None:
    """Return a run without a checkpoint that has this configuration, as far as that is known without MLflow."""
    if not attempt.may_be_unstarted_run():
        return None
    digest = config_digest(config.to_dict())
    if attempt.unstarted_runs and attempt.inherited and config_digest(attempt.inherited) == digest:
        return attempt.unstarted_runs[0]
    if journal is None or journal.run is None or journal.lease is None or _is_only_marked(journal):
        return None
    if journal.lease.config == digest:
        return journal.run_id_of(journal.run)
    return None


def _find_unstarted_run(
    client: "MlflowClient", attempt: Attempt, journal: Journal | None, config: RunConfig
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
    client: "MlflowClient",
    known: str | None,
    first: "Create | Reopen",
    attempt: Attempt,
    mlflow_run_id: str | None,
    turn: Turn,
    mark: str,
    total_iters: int,
) -> OpenedRun:
    """Create the run with a mark, or continue the known one, in a store that answers."""
    is_new, ended = False, None
    if known is None:
        assert isinstance(first, Create)  # noqa: S101 - a known run is reopened
        known, is_new = make_run(client, replace(first, tags={**first.tags, **turn.lease.claim(None)}), mark=mark)
    else:
        if attempt.own_point is not None and attempt.own_point.is_final(total_iters):
            ended = _end_of(client, known)
        is_mlflow_run = known == mlflow_run_id
        _continue(client, known, dict(first.tags), attempt, turn, is_mlflow_run=is_mlflow_run, ended=ended)
    with mlflow_errors(f"read run {known}"):
        run = client.get_run(known)
    wrapper_run = None
    if mlflow_run_id is not None and mlflow_run_id != known:
        wrapper_run = WrapperRun(client, mlflow_run_id, tags={CONTINUES_TAG: known})
    return OpenedRun(known, (), is_new, run.info.run_name, run.info.experiment_id, wrapper_run, ended)


def _end_of(client: "MlflowClient", run_id: str) -> int | None:
    """Return when a run finished; None if it has not."""
    with suppress(TrackingError), mlflow_errors(f"read run {run_id}"):
        info = client.get_run(run_id).info
        return info.end_time if info.status == "FINISHED" else None
    return None


def _continue(
    client: "MlflowClient",
    run_id: str,
    tags: dict[str, str],
    attempt: Attempt,
    turn: Turn,
    *,
    is_mlflow_run: bool,
    ended: int | None,
) -> None:
    """Take the run, and set it to RUNNING again, unless it has ended and nothing is left to train."""
    try:
        claim = turn.take(client, run_id)
        if attempt.own_point is not None and not attempt.own_point.is_newest_valid:
            require_not_beyond(client, run_id, attempt.own_point.iters)
        if ended is None:
            reopen_run(client, run_id, {**tags, **claim})
        else:
            require_active_run(client, run_id)
            RunTarget(client, run_id, Path()).set_tags(claim)
    except TrackingError as error:
        if is_mlflow_run or not error.answered:
            raise
        raise ResumeError(
            f"{error}; --new-run continues as a run of its own, --tracking-uri names another store",
            code="run-not-continued",
        ) from error
