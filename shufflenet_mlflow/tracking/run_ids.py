"""Complete the first characters of a run ID, and suggest an ID for a mistyped one."""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.checkpoints.references import RunReference, is_run_id, parse_reference
from shufflenet_mlflow.errors import TrackingError, UnresolvedError
from shufflenet_mlflow.runtime.text import name_some
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import stored_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

_SEARCHED = 1000
"""Newest runs among which a mistyped ID is looked up."""
_SIMILARITY = 0.85


def complete(ref: str | Path, store: str | Connection | None) -> str | Path:
    """Return `ref` with the whole run ID if it has only the first characters of one; any other reference unchanged.

    Raises:
        UnresolvedError: they begin no run ID, or more than one.
        TrackingError: MLflow did not answer.
    """
    beginning = beginning_of(ref)
    if beginning is None:
        return ref
    names = find_run_ids(beginning, store)
    if len(names) == 1:
        return str(ref).replace(beginning, next(iter(names)), 1)
    address = redact(Connection.to(store).uri)
    if not names:
        is_not = "is not" if str(ref).startswith("runs:/") else "is not a file or folder, nor"
        suggestion = may_have_been(beginning, store)
        raise UnresolvedError(
            f"{str(ref)!r} {is_not} the start of a run ID in {address}{suggestion}; `shufflenet runs` lists them, "
            "--tracking-uri or MLFLOW_TRACKING_URI names another store",
            code="run-id-unknown",
        )
    listed = name_some([f"{run_id} ({name})" for run_id, name in names.items()], most=4)
    raise UnresolvedError(
        f"{str(ref)!r} is the start of several run IDs in {address}: {listed}; give more characters",
        code="run-id-ambiguous",
    )


def beginning_of(ref: str | Path) -> str | None:
    """Return the first characters of a run ID that `ref` has instead of a whole one; None for any other reference."""
    reference = parse_reference(ref)
    return reference.run_id if isinstance(reference, RunReference) and not is_run_id(reference.run_id) else None


def find_run_ids(beginning: str, store: str | Connection | None) -> dict[str, str]:
    """Return the run IDs with that beginning, and their names, also of deleted runs; newest first.

    Raises:
        TrackingError: MLflow did not answer.
    """
    return _newest(store, f"attributes.run_id LIKE '{beginning}%'", f"run IDs that begin with {beginning}")


def may_have_been(mistyped: str, store: str | Connection | None) -> str:
    """Return `, perhaps ID (name)` if a recent run's ID is similar; otherwise nothing."""
    with suppress(TrackingError):
        names = _newest(store, "", "similar run IDs")
        ids = {run_id[: len(mistyped)]: run_id for run_id in names}
        for near in get_close_matches(mistyped, ids, n=1, cutoff=_SIMILARITY):
            return f", perhaps {ids[near]} ({names[ids[near]]})"
    return ""


def _newest(store: str | Connection | None, filter_string: str, what: str) -> dict[str, str]:
    """Return ID -> name of the newest matching runs."""
    store = Connection.to(store)
    if not store.exists():
        return {}
    client = store.client
    from mlflow.entities import ViewType

    with mlflow_errors(f"look for {what}"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments(ViewType.ALL)]
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs(experiments, filter_string, ViewType.ALL, _SEARCHED, newest)
    return {run.info.run_id: run.info.run_name for run in runs}


def is_missing(error: TrackingError) -> bool:
    """Whether MLflow answered that something does not exist."""
    return error.mlflow_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def read_run(store: Connection, run_id: str) -> "Run":
    """Read a run, once per connection.

    Raises:
        UnresolvedError: there is no such run in the store.
        TrackingError: MLflow did not answer.
    """
    try:
        return store.run(run_id)
    except TrackingError as error:
        if not is_missing(error):
            raise
        suggestion = may_have_been(run_id, store)
        raise UnresolvedError(
            f"there is no run {run_id} in {stored_uri(store.client.tracking_uri)}{suggestion}; "
            "--tracking-uri or MLFLOW_TRACKING_URI names another store",
            code="run-missing",
        ) from error
