"""Create, continue and end MLflow runs, and find those of earlier attempts."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG
from shufflenet_mlflow.config import DEFAULT_EXPERIMENT
from shufflenet_mlflow.errors import ResumeError, TrackingError
from shufflenet_mlflow.runtime.signals import StopRequested
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.messages import Create, Reopen, now_ms
from shufflenet_mlflow.tracking.names import CONFIG_TAG, DIRTY_TAG, JOB_TAG, JOURNAL_ID_TAG
from shufflenet_mlflow.tracking.provenance import provenance_tags
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import Message, RunTarget, manifest_in_tag

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]


RUN_ID_VARIABLE = "MLFLOW_RUN_ID"
"""Variable in which `mlflow run` tells its child process the run that it created for it."""


def peek_mlflow_run_id() -> str | None:
    """Return the run that `mlflow run` created for this process, if nothing has taken it yet."""
    return os.environ.get(RUN_ID_VARIABLE)


def take_mlflow_run_id() -> str | None:
    """Return the run that `mlflow run` created for this process, once: child processes must not take it too."""
    return os.environ.pop(RUN_ID_VARIABLE, None)


def get_experiment_id(client: "MlflowClient", name: str) -> str:
    """Return the experiment's ID, creating the experiment if it does not exist.

    Raises:
        TrackingError: the store does not answer, or the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_errors(f"open the experiment {name!r} in {redact(client.tracking_uri)}"):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name))
            except MlflowException:  # another process may have made it meanwhile; any other reason shows below
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} was deleted; `mlflow experiments restore -x "
            f"{experiment.experiment_id}` brings it back, --experiment names another",
            "INVALID_STATE",
            code="experiment-deleted",
        )
    return str(experiment.experiment_id)


def _wanted(experiment: str | None) -> tuple[str, str | None]:
    """Return the name of the experiment that is asked for, and its ID if the environment names that."""
    experiment_id = None if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID")
    return experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT, experiment_id


def wanted_experiment(client: "MlflowClient", experiment: str | None) -> tuple[str, str | None]:
    """Return the experiment's name and ID; the ID is None if it does not exist.

    Args:
        experiment: by default `MLFLOW_EXPERIMENT_ID` or `MLFLOW_EXPERIMENT_NAME`, or else `DEFAULT_EXPERIMENT`.

    Raises:
        TrackingError: the store does not answer.
    """
    name, experiment_id = _wanted(experiment)
    if experiment_id is not None:
        return f"with the ID {experiment_id}", experiment_id
    with mlflow_errors(f"look for the experiment {name!r} in {redact(client.tracking_uri)}"):
        found = client.get_experiment_by_name(name)
    return name, None if found is None else str(found.experiment_id)


def new_run(*, experiment: str | None, name: str, tags: Mapping[str, str]) -> Create:
    """Return the message that creates a run, now or later.

    Args:
        experiment: as for `wanted_experiment`.
    """
    experiment, experiment_id = _wanted(experiment)
    return Create(experiment, experiment_id, name, {**provenance_tags(), **tags}, now_ms())


def make_run(client: "MlflowClient", create: Create, *, journal_id: str | None = None) -> tuple[str, bool]:
    """Create a run.

    Args:
        journal_id: its provisional ID while the server was away: a run that has it as a tag is returned instead.

    Returns:
        Its ID, and whether it is new.

    Raises:
        TrackingError: the store does not answer, or the experiment was deleted.
    """
    experiment_id = create.experiment_id or get_experiment_id(client, create.experiment or DEFAULT_EXPERIMENT)
    tags = dict(create.tags)
    with mlflow_errors("create a run"):
        if journal_id is not None:
            tags[JOURNAL_ID_TAG] = journal_id
            found = client.search_runs([experiment_id], filter_string=f"tags.`{JOURNAL_ID_TAG}` = '{journal_id}'")
            if found:
                return str(found[0].info.run_id), False
        run = client.create_run(experiment_id, run_name=create.name, tags=tags, start_time=create.start_time)
    return str(run.info.run_id), True


@dataclass(frozen=True)
class KnownRun:
    """A run in MLflow."""

    run_id: str
    has_checkpoint: bool


def find_job(client: "MlflowClient", job: str, experiment: str | None) -> KnownRun | None:
    """Return the latest run of a job; None if there is none.

    Args:
        experiment: as for `new_run`.

    Raises:
        TrackingError: the store does not answer.
    """
    _, experiment_id = wanted_experiment(client, experiment)
    if experiment_id is None:
        return None
    with mlflow_errors(f"look for the job {job!r} in {redact(client.tracking_uri)}"):
        runs = client.search_runs(
            [experiment_id], f"tags.`{JOB_TAG}` = '{job}'", max_results=1, order_by=["attributes.start_time DESC"]
        )
    return _known(runs[0]) if runs else None


def known_run(client: "MlflowClient", run_id: str) -> KnownRun:
    """Look a run up by its ID.

    Raises:
        TrackingError: there is no such run, or the store does not answer.
    """
    with mlflow_errors(f"read run {run_id} in {redact(client.tracking_uri)}"):
        return _known(client.get_run(run_id))


def _known(run: "Run") -> KnownRun:
    return KnownRun(run.info.run_id, LATEST_TAG in run.data.tags)


def config_to_begin_with(client: "MlflowClient", run_id: str) -> dict[str, Any] | None:
    """Return the configuration of a run that has no checkpoint yet, to start it again; None for any other run.

    Raises:
        TrackingError: the store does not answer.
    """
    try:
        with mlflow_errors(f"read run {run_id}"):
            run = client.get_run(run_id)
    except TrackingError as error:
        if error.answered:
            return None
        raise
    tags = run.data.tags
    if run.info.lifecycle_stage != "active" or LATEST_TAG in tags:
        return None
    try:
        config = json.loads(tags.get(CONFIG_TAG, ""))
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def tags_for_mlflow_run(name: str | None, tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags for the run that `mlflow run` created; its own source and commit are kept."""
    own = {
        key: value
        for key, value in provenance_tags().items()
        if not key.startswith(("mlflow.source", "mlflow.user")) or key == DIRTY_TAG
    }
    return {**own, **({"mlflow.runName": name} if name else {}), **tags}


def reopen_run(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    """Set a run to RUNNING again.

    Raises:
        TrackingError: there is no such run, it was deleted, or the store does not answer.
    """
    with mlflow_errors(f"continue run {run_id} in {redact(client.tracking_uri)}"):
        run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise TrackingError(
            f"run {run_id} was deleted; `mlflow runs restore` brings it back",
            "RESOURCE_DOES_NOT_EXIST",
            code="run-deleted",
        )
    Reopen(tags).send(RunTarget(client, run_id, Path()))


def require_not_beyond(client: "MlflowClient", run_id: str, iters: int) -> None:
    """Refuse to continue a run from iteration `iters` if it has gone on beyond it, which would overwrite its end.

    Raises:
        ResumeError: it has.
        TrackingError: the store does not answer, or does not know the run.
    """
    with mlflow_errors(f"continue run {run_id} in {redact(client.tracking_uri)}"):
        tags = client.get_run(run_id).data.tags
    latest = manifest_in_tag(tags, LATEST_TAG)
    if latest is not None and latest.iters > iters:
        raise ResumeError(
            f"run {run_id} is already at iteration {latest.iters}, and this checkpoint is from iteration {iters}; "
            f"--resume {run_id} continues it, --new-run with another --save-dir forks it here",
            code="run-gone-on",
        )


def status_after(kind: type[BaseException] | None) -> Status:
    """Return the status of a run whose block ended with an exception of that kind, or without one."""
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, (StopRequested, KeyboardInterrupt)) else "FAILED"


class WrapperRun:
    """The run that `mlflow run` created, written to directly.

    As a context manager it ends the run: FINISHED, or `status`, at the end of the block; FAILED after an exception,
    KILLED after an interruption.
    """

    def __init__(self, client: "MlflowClient", run_id: str, *, tags: Mapping[str, str]) -> None:
        self.target = RunTarget(client, run_id, Path())
        self.status: Status = "FINISHED"
        reopen_run(client, run_id, tags_for_mlflow_run(None, tags))

    def send(self, message: Message) -> None:
        """Send a message now.

        Raises:
            TrackingError: it did not arrive.
        """
        message.send(self.target)

    def __enter__(self) -> "WrapperRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        status = self.status if kind is None else status_after(kind)
        try:
            with mlflow_errors(f"end run {self.target.run_id}"):
                self.target.client.set_terminated(self.target.run_id, status)
        except TrackingError as error:
            if status == "FINISHED":
                raise
            # What ended the run is what the caller must hear of first.
            logger.warning("the run's status could not be set: %s", error)
