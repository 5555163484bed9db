"""Resolve a checkpoint reference to a verified file."""

import logging
import os
from pathlib import Path

from shufflenet_mlflow.checkpoints.folders import Resolved, newest_valid, resolve_file
from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG, CheckpointManifest
from shufflenet_mlflow.checkpoints.references import FORMS, RunReference, default_folder, parse_reference
from shufflenet_mlflow.checkpoints.schema import is_own
from shufflenet_mlflow.checkpoints.verification import VerifiedCheckpoint
from shufflenet_mlflow.config import default_cache_dir
from shufflenet_mlflow.errors import TrackingError, UnresolvedError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import active_run_id, uri_of_caller
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.run_ids import beginning_of, complete, find_run_ids, read_run
from shufflenet_mlflow.tracking.target import manifest_in_tag

logger = logging.getLogger(__name__)


def resolve(
    ref: str | Path,
    *,
    tracking_uri: str | Connection | None = None,
    cache_dir: str | Path | None = None,
    reporter: Reporter | None = None,
    prefer_best: bool = False,
) -> Resolved:
    """Return the verified checkpoint that `ref` names.

    Args:
        ref: a file, a folder, a run ID or the first six characters of it and more, `runs:/<id>`,
            `runs:/<id>@latest|@best|@<iters>`, or `models:/<name>@<alias>` or `models:/<name>/<version>`.
        tracking_uri: the store that has the runs, or a connection to it; by default MLflow's own.
        cache_dir: where remote files land; by default in the user's cache folder.
        reporter: shows how a download comes along.
        prefer_best: a run ID alone means the run's best checkpoint, if it has one; otherwise the latest.

    Raises:
        UnresolvedError: nothing usable stands behind it; the message says what was found instead.
        CheckpointError: a file that was named exactly does not verify.
        TrackingError: MLflow did not answer.
    """
    store = Connection.to(tracking_uri)
    ref = complete(ref, store)
    reference = parse_reference(ref)
    if isinstance(reference, Path):
        if os.path.isdir(reference):  # unlike Path.is_dir, never raises
            found = newest_valid(reference)
            if found is None:
                raise UnresolvedError(
                    f"{str(ref)!r} is a folder without checkpoints; name the one that --save-dir named, or "
                    "models/RUN_ID",
                    code="folder-without-checkpoints",
                )
            return found
        if os.path.exists(reference):
            return resolve_file(reference)
        raise UnresolvedError(f"{str(ref)!r} does not exist; a checkpoint is {FORMS}", code="reference-missing")

    from shufflenet_mlflow.tracking.remote_checkpoints import resolve_model, resolve_run  # only when MLflow is needed

    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if isinstance(reference, RunReference):
        return resolve_run(reference, store, cache_dir=folder, reporter=reporter, prefer_best=prefer_best)
    return resolve_model(reference, store, cache_dir=folder, reporter=reporter)


def latest_of_run(run_id: str, store: Connection) -> CheckpointManifest | None:
    """Return the manifest in a run's `checkpoint.latest`, without fetching the file; None if there is none.

    Raises:
        UnresolvedError: there is no such run.
        TrackingError: MLflow did not answer.
    """
    return manifest_in_tag(read_run(store, run_id).data.tags, LATEST_TAG)


def get_latest_model(
    ref: str | Path | None = None,
    *,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Path | None, int]:
    """Return the newest valid checkpoint that `ref` names, and its iterations.

    Args:
        ref: a file, a folder, a run ID, `runs:/<id>`, `runs:/<id>@latest|@best|@<iters>`, or
            `models:/<name>@<alias>` or `models:/<name>/<version>`. Of a run, the newest on this machine
            (`models/RUN_ID`) or in MLflow; if MLflow does not answer, this machine's. By default the active run's;
            without one, that of the folder `models`.
        tracking_uri: where runs are looked up; by default as MLflow does.
        cache_dir: where remote files land; by default `SHUFFLENET_CACHE_DIR`, or the user's cache folder.

    Returns:
        The file and its iterations; (None, 0) for an empty or missing folder, and for an active run without any.

    Raises:
        UnresolvedError: nothing usable stands behind it; the message says what was found instead.
        CheckpointError: a file that was named exactly does not verify.
        TrackingError: MLflow did not answer.
    """
    store = Connection(tracking_uri or uri_of_caller())
    if ref is None:
        return _latest_of_script(store, cache_dir)
    reference = parse_reference(ref)
    if beginning_of(ref) == str(ref) and not find_run_ids(str(ref), store):  # the name of a missing folder
        return None, 0
    if isinstance(reference, Path) and not os.path.isfile(reference):
        found = newest_valid(reference)
        return (found.path, found.iters) if found else (None, 0)
    if isinstance(reference, RunReference) and reference.is_latest and (run_id := reference.run_id):
        folder = default_folder(run_id)
        found = newest_here_or_in_run(folder, run_id, store, cache_dir) if os.path.isdir(folder) else None
        if found is not None:
            return found.path, found.iters
    resolved = resolve(ref, tracking_uri=store, cache_dir=cache_dir)
    return resolved.path, resolved.iters


def _latest_of_script(store: Connection, cache_dir: str | Path | None) -> tuple[Path | None, int]:
    """Return the newest checkpoint of the active run, on this machine or in MLflow; without one, of the folder."""
    run_id = active_run_id()
    found = newest_here_or_in_run(default_folder(run_id), run_id, store, cache_dir)
    if found is None and run_id is not None:
        found = newest_valid(
            default_folder(None), lambda checkpoint: run_of(checkpoint) == run_id
        )  # as version 0.1 did
    return (found.path, found.iters) if found else (None, 0)


def newest_here_or_in_run(
    directory: Path, run_id: str | None, store: Connection, cache_dir: str | Path | None = None
) -> Resolved | None:
    """Return a run's newest checkpoint that verifies, in a folder or in MLflow; without a run, the folder's.

    If MLflow does not answer soon, that is logged and the folder alone decides.

    Raises:
        UnresolvedError: there are checkpoints in the folder, and none verifies.
        TrackingError: MLflow has answered that there is no such run.
    """
    if run_id is None:
        return newest_valid(directory)
    found = newest_valid(directory, lambda checkpoint: run_of(checkpoint) == run_id)
    try:
        with store.impatient():
            latest = latest_of_run(run_id, store)
        if latest is not None and (found is None or latest.iters > found.iters):
            found = resolve(run_id, tracking_uri=store, cache_dir=cache_dir)
    except TrackingError as error:
        if error.answered:
            raise
        logger.warning("%s; only this machine's checkpoints are considered", error)
    return found


def run_of(checkpoint: VerifiedCheckpoint) -> str | None:
    """Return the run that a checkpoint belongs to, also if MLflow created it after the file was written.

    Raises:
        CheckpointError: the file cannot be read.
    """
    payload = checkpoint.read()
    run_id: str | None = payload.get("run_id") if is_own(payload) else None
    return run_id or read_pending(checkpoint.path.parent).run_id
