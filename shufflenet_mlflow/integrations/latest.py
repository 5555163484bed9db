"""The checkpoint that a callback's training goes on with."""

from pathlib import Path

from shufflenet_mlflow.checkpoints.references import default_folder
from shufflenet_mlflow.tracking.client import active_run_id, uri_of_caller
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.resolve import get_latest_model, newest_here_or_in_run


def newest_checkpoint(
    ref: str | Path | None, directory: str | Path | None, run_id: str | None, tracking_uri: str | None
) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there is none yet.

    Args:
        ref: names it; by default the run's, in its folder or in MLflow.
        directory: the folder; by default `models/RUN_ID`, or `models` without a run.
        run_id: the MLflow run; by default the active one, if any.
        tracking_uri: of the store that has the run; by default as MLflow does.

    Raises:
        UnresolvedError, CheckpointError, TrackingError: see `get_latest_model`.
    """
    if ref is not None:
        return get_latest_model(ref, tracking_uri=tracking_uri)[0]
    run_id = run_id or active_run_id()
    folder = Path(directory) if directory is not None else default_folder(run_id)
    found = newest_here_or_in_run(folder, run_id, Connection(tracking_uri or uri_of_caller()))
    return None if found is None else found.path
