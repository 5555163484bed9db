"""The ID of a run from its first characters, and what a mistyped one may have been."""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from shufflenet_mlflow.checkpoints.references import RunReference, is_run_id, parse_reference
from shufflenet_mlflow.errors import TrackingError, UnresolvedError
from shufflenet_mlflow.tracking.client import connect, mlflow_errors
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import store_file, uri_in_force

_NAMED = 4
"""Runs that a message names at most."""
_SEARCHED = 1000
"""Newest runs among which the one is looked for that was meant."""
_ALIKE = 0.85


def complete(ref: str | Path, tracking_uri: str | None) -> str | Path:
    """`ref` with the whole ID of its run, where it has but the first characters of one; anything else as it is.

    Raises:
        UnresolvedError: no run begins so, or several do.
        TrackingError: MLflow did not answer.
    """
    beginning = beginning_of(ref)
    if beginning is None:
        return ref
    found = find_run_ids(beginning, tracking_uri)
    if len(found) == 1:
        return str(ref).replace(beginning, next(iter(found)), 1)
    store = redact(uri_in_force(tracking_uri))
    if not found:
        also = "" if str(ref).startswith("runs:/") else "is no file or folder, and "
        like = may_have_been(beginning, tracking_uri)
        raise UnresolvedError(
            f"{str(ref)!r} {also}begins no run's ID in {store}{like}; `shufflenet runs` lists them, --tracking-uri or "
            "MLFLOW_TRACKING_URI names another store",
            code="run-id-unknown",
        )
    listed = ", ".join(f"{run_id} ({name})" for run_id, name in list(found.items())[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise UnresolvedError(
        f"{str(ref)!r} begins several runs' IDs in {store}: {listed}{more}; give more characters",
        code="run-id-ambiguous",
    )


def beginning_of(ref: str | Path) -> str | None:
    """The first characters of an ID that `ref` has instead of a whole one; None for any other reference."""
    reference = parse_reference(ref)
    return reference.run_id if isinstance(reference, RunReference) and not is_run_id(reference.run_id) else None


def find_run_ids(beginning: str, tracking_uri: str | None) -> dict[str, str]:
    """The IDs that begin so, with their runs' names, also of deleted runs; newest first.

    Raises:
        TrackingError: MLflow did not answer.
    """
    return _newest(tracking_uri, f"attributes.run_id LIKE '{beginning}%'", f"run IDs that begin with {beginning}")


def may_have_been(mistyped: str, tracking_uri: str | None) -> str:
    """`, perhaps …`, if one of the newest runs' IDs is like this one, or like this beginning of one; else nothing."""
    with suppress(TrackingError):
        names = _newest(tracking_uri, "", "like runs")
        ids = {run_id[: len(mistyped)]: run_id for run_id in names}
        for near in get_close_matches(mistyped, ids, n=1, cutoff=_ALIKE):
            return f", perhaps {ids[near]} ({names[ids[near]]})"
    return ""


def _newest(tracking_uri: str | None, filter_string: str, what: str) -> dict[str, str]:
    """ID -> name of the newest runs that fit."""
    file = store_file(uri_in_force(tracking_uri))
    if file is not None and not file.exists():
        return {}  # MLflow would make it, to find nothing in it
    client = connect(tracking_uri)
    from mlflow.entities import ViewType

    with mlflow_errors(f"look for {what}"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments(ViewType.ALL)]
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs(experiments, filter_string, ViewType.ALL, _SEARCHED, newest)
    return {run.info.run_id: run.info.run_name for run in runs}
