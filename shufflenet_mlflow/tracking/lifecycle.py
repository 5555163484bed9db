"""Deleted runs and experiments, which MLflow hides and keeps: they can be read, and nothing is written to them.

Restoring a run does not restore its experiment. So both are looked at, and the message names the commands that help.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shufflenet_mlflow.errors import DeletedError, TrackingError
from shufflenet_mlflow.tracking.client import NOT_ACTIVE, mlflow_errors
from shufflenet_mlflow.tracking.exchanges import impatient
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import mlflow_command

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run


_ACTIVE = "active"


def is_active(run: "Run") -> bool:
    """Whether a run was not deleted, whatever its experiment was."""
    return bool(run.info.lifecycle_stage == _ACTIVE)


def require_active(client: "MlflowClient", run: "Run") -> None:
    """Refuse to write to a run that was deleted, or whose experiment was.

    Raises:
        DeletedError: it was; the message names what restores it.
        TrackingError: the store does not answer.
    """
    run_id, experiment = run.info.run_id, read_experiment(client, run)
    has_experiment = experiment.lifecycle_stage == _ACTIVE
    restoring = [] if has_experiment else [_restore_experiment(client, experiment)]
    if not is_active(run):
        restoring.append(mlflow_command(f"mlflow runs restore --run-id {run_id}", client.tracking_uri))
    if not restoring:
        return
    command = " && ".join(restoring)
    if is_active(run):
        what = f"the experiment {experiment.name!r} of run {run_id} was deleted; `{command}` restores it"
    elif has_experiment:
        what = f"run {run_id} was deleted; `{command}` restores it"
    else:
        what = f"run {run_id} and its experiment {experiment.name!r} were deleted; `{command}` restores them"
    raise DeletedError(what, command, code="run-deleted")


def read_experiment(client: "MlflowClient", run: "Run") -> "Experiment":
    """Return a run's experiment, deleted or not."""
    with mlflow_errors(f"read the experiment {run.info.experiment_id} of run {run.info.run_id}"):
        return client.get_experiment(run.info.experiment_id)


def require_active_run(client: "MlflowClient", run_id: str) -> None:
    """Read a run, and refuse as `require_active` does."""
    with mlflow_errors(f"read run {run_id} in {redact(client.tracking_uri)}"):
        run = client.get_run(run_id)
    require_active(client, run)


def refuse_deleted_run(client: "MlflowClient", run_id: str) -> None:
    """Refuse to write to a run that is known to be deleted; if the store does not answer, that shows later.

    Raises:
        DeletedError: as for `require_active`.
    """
    with impatient(), suppress_unanswered():
        require_active_run(client, run_id)


@contextmanager
def suppress_unanswered() -> Iterator[None]:
    """Leave out what fails in the block, unless a run or an experiment was deleted."""
    try:
        yield
    except DeletedError:
        raise
    except TrackingError:
        pass


def require_active_experiment(client: "MlflowClient", experiment: "Experiment") -> None:
    """Refuse to use a deleted experiment.

    Raises:
        DeletedError: it was; the message names what restores it.
    """
    if experiment.lifecycle_stage != _ACTIVE:
        command = _restore_experiment(client, experiment)
        raise DeletedError(
            f"the experiment {experiment.name!r} was deleted; `{command}` restores it, --experiment names another",
            command,
            code="experiment-deleted",
        )


def _restore_experiment(client: "MlflowClient", experiment: "Experiment") -> str:
    return mlflow_command(f"mlflow experiments restore --experiment-id {experiment.experiment_id}", client.tracking_uri)


def explained(client: "MlflowClient", run_id: str, error: TrackingError) -> TrackingError:
    """Return the error of writing to a run or, if MLflow refused because that was deleted, the one that says so."""
    if NOT_ACTIVE not in str(error):
        return error
    try:
        require_active_run(client, run_id)
    except DeletedError as deleted:
        return deleted
    except TrackingError:
        pass
    return error
