"""Create, continue and end MLflow runs, and find those of earlier attempts."""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG
from shufflenet_mlflow.config import DEFAULT_EXPERIMENT
from shufflenet_mlflow.errors import ResumeError, TrackingError
from shufflenet_mlflow.runtime.signals import StopRequested
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.exchanges import impatient
from shufflenet_mlflow.tracking.journal_file import is_created
from shufflenet_mlflow.tracking.lifecycle import (
    is_active,
    require_active_experiment,
    require_active_run,
)
from shufflenet_mlflow.tracking.messages import Create, Reopen, now_ms
from shufflenet_mlflow.tracking.names import (
    CONFIG_TAG,
    CONTINUES_TAG,
    DIRTY_TAG,
    JOB_TAG,
    JOURNAL_ID_TAG,
    PARENT_RUN_TAG,
    RESUMED_FROM_RUN_TAG,
)
from shufflenet_mlflow.tracking.paths import artifact_location, store_file
from shufflenet_mlflow.tracking.provenance import provenance_tags
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import Message, RunTarget, manifest_in_tag

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]


LOST_RUN_SECONDS = 10.0
"""Seconds to look for a run whose creation was not confirmed."""

EXPERIMENT_ID_VARIABLE = "MLFLOW_EXPERIMENT_ID"
MLFLOW_DEFAULT_EXPERIMENT_ID = "0"
"""ID of the experiment `Default`, which every store has."""

_PROJECT_TAGS = ("mlflow.project.", "mlflow.source.git.", "mlflow.gitRepoURL")

RUN_ID_VARIABLE = "MLFLOW_RUN_ID"
"""Variable in which `mlflow run` tells its child process the run that it created for it."""


def peek_mlflow_run_id() -> str | None:
    """Return the run that `mlflow run` created for this process, if nothing has taken it yet."""
    return os.environ.get(RUN_ID_VARIABLE) or None


def take_mlflow_run_id() -> str | None:
    """Return the run that `mlflow run` created for this process, once: child processes must not take it too."""
    if _names_default_for_want_of_another():
        del os.environ[EXPERIMENT_ID_VARIABLE]
    return os.environ.pop(RUN_ID_VARIABLE, None) or None


def _names_default_for_want_of_another() -> bool:
    """Whether the environment names MLflow's default experiment because `mlflow run` was told none."""
    return peek_mlflow_run_id() is not None and os.environ.get(EXPERIMENT_ID_VARIABLE) == MLFLOW_DEFAULT_EXPERIMENT_ID


def get_experiment_id(client: "MlflowClient", name: str) -> str:
    """Return the experiment's ID, creating the experiment if it does not exist.

    Raises:
        DeletedError: the experiment was deleted.
        TrackingError: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    with mlflow_errors(f"open the experiment {name!r} in {redact(client.tracking_uri)}"):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                location = artifact_location(name) if store_file(client.tracking_uri) is not None else None
                return str(client.create_experiment(name, artifact_location=location))
            except (
                MlflowException,
                OSError,
            ):  # another process may have made it meanwhile; any other reason shows below
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
    require_active_experiment(client, experiment)
    return str(experiment.experiment_id)


def _wanted(experiment: str | None) -> tuple[str, str | None]:
    """Return the name of the experiment that is asked for, and its ID if the environment names that."""
    named = not experiment and not _names_default_for_want_of_another()
    experiment_id = os.environ.get(EXPERIMENT_ID_VARIABLE) or None if named else None
    return experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT, experiment_id


def wanted_experiment(client: "MlflowClient", experiment: str | None) -> tuple[str, str | None]:
    """Return the experiment's name and ID; the ID is None if it does not exist.

    Args:
        experiment: by default `MLFLOW_EXPERIMENT_ID` or `MLFLOW_EXPERIMENT_NAME`, or else `DEFAULT_EXPERIMENT`.

    Raises:
        DeletedError: the experiment was deleted.
        TrackingError: the store does not answer.
    """
    name, experiment_id = _wanted(experiment)
    named = repr(name) if experiment_id is None else f"with the ID {experiment_id}"
    with mlflow_errors(f"look for the experiment {named} in {redact(client.tracking_uri)}"):
        found = client.get_experiment_by_name(name) if experiment_id is None else client.get_experiment(experiment_id)
    if found is None:
        return name, None
    require_active_experiment(client, found)
    return (name if experiment_id is None else named), str(found.experiment_id)


def new_run(*, experiment: str | None, name: str, tags: Mapping[str, str]) -> Create:
    """Return the message that creates a run, now or later.

    Args:
        experiment: as for `wanted_experiment`.
    """
    experiment, experiment_id = _wanted(experiment)
    return Create(experiment, experiment_id, name, {**provenance_tags(), **tags}, now_ms())


def make_run(client: "MlflowClient", create: Create, *, mark: str, is_first: bool = True) -> tuple[str, bool]:
    """Create a run.

    Args:
        mark: goes with the run as a tag, by which it is found again if MLflow's answer is lost.
        is_first: nobody has tried before; otherwise a run with that mark is returned instead.

    Returns:
        Its ID, and whether it is new.

    Raises:
        DeletedError: the experiment was deleted.
        TrackingError: the store does not answer; the run may exist nevertheless.
    """
    create = replace(create, tags=_with_created_parent(client, create))
    experiment_id = create.experiment_id or get_experiment_id(client, create.experiment or DEFAULT_EXPERIMENT)
    if not is_first:
        found = _marked_runs(client, experiment_id, mark)
        if found:
            return found[0], False
    try:
        if create.experiment_id is not None:
            with mlflow_errors(f"read the experiment {experiment_id}"):
                require_active_experiment(client, client.get_experiment(experiment_id))
        with mlflow_errors("create a run"):
            run = client.create_run(
                experiment_id,
                run_name=create.name,
                tags={**create.tags, JOURNAL_ID_TAG: mark},
                start_time=create.start_time,
            )
    except TrackingError as error:
        if error.answered:
            raise
        found = []
        with suppress(TrackingError):
            found = _marked_runs(client, experiment_id, mark)
        if not found:
            raise
        return found[0], True
    return str(run.info.run_id), True


def _with_created_parent(client: "MlflowClient", create: Create) -> Mapping[str, str]:
    """Return a run's tags with the ID of its parent, which may have been created while the server was away, too.

    Raises:
        TrackingError: the parent has not been created yet, or the store does not answer.
    """
    parent = create.tags.get(PARENT_RUN_TAG)
    if parent is None or is_created(parent):
        return create.tags
    run_id = find_marked_run(client, create, parent)
    if run_id is None:
        raise TrackingError(
            "cannot create a run: its parent run has not been created yet; `shufflenet sync` of the study's folder "
            "sends both",
            code="parent-not-created",
        )
    return {**create.tags, PARENT_RUN_TAG: run_id}


def find_marked_run(client: "MlflowClient", create: Create, mark: str) -> str | None:
    """Return the run that a process, since killed, has created with a mark; None if it did not come to that.

    Raises:
        TrackingError: the store does not answer.
    """
    experiment_id = create.experiment_id or get_experiment_id(client, create.experiment or DEFAULT_EXPERIMENT)
    return next(iter(_marked_runs(client, experiment_id, mark)), None)


def _marked_runs(client: "MlflowClient", experiment_id: str, mark: str) -> list[str]:
    """Return the runs with a mark, oldest first."""
    with mlflow_errors("look for the run that is being created"):
        runs = client.search_runs([experiment_id], filter_string=f"tags.`{JOURNAL_ID_TAG}` = '{mark}'")
    return [str(run.info.run_id) for run in reversed(runs)]


def end_lost_run(client: "MlflowClient", create: Create, mark: str) -> None:
    """Set a run to FAILED whose creation nobody heard of; wait a little for a request that took its time."""
    ends = time.monotonic() + LOST_RUN_SECONDS
    with impatient():
        while time.monotonic() < ends:
            with suppress(TrackingError):
                experiment_id = create.experiment_id or get_experiment_id(client, create.experiment or "")
                found = _marked_runs(client, experiment_id, mark)
                for run_id in found:
                    with mlflow_errors(f"end run {run_id}"):
                        client.set_terminated(run_id, "FAILED")
                if found:
                    return
            time.sleep(1.0)


def end_surplus_runs(client: "MlflowClient", run_id: str, mark: str) -> None:
    """Delete empty runs with the mark of `run_id`: requests to create it that took their time.

    Raises:
        TrackingError: the store does not answer.
    """
    with mlflow_errors(f"read run {run_id}"):
        experiment_id = client.get_run(run_id).info.experiment_id
    for other in _marked_runs(client, experiment_id, mark):
        if other == run_id:
            continue
        with mlflow_errors(f"delete the empty run {other}"):
            data = client.get_run(other).data
            if not data.metrics and not data.params:
                client.set_terminated(other, "KILLED")
                client.delete_run(other)


@dataclass(frozen=True)
class KnownRun:
    """A run in MLflow."""

    run_id: str
    has_checkpoint: bool


def find_job(client: "MlflowClient", job: str, experiment: str | None) -> KnownRun | None:
    """Return the latest run of a job; None if there is none.

    A run is earlier than its forks, whatever the clocks said; among the others, the one that began last counts.

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
            [experiment_id], f"tags.`{JOB_TAG}` = '{job}'", order_by=["attributes.start_time DESC"]
        )
    parents = {run.data.tags.get(RESUMED_FROM_RUN_TAG) for run in runs}
    return next((_known(run) for run in runs if run.info.run_id not in parents), None)


def known_run(client: "MlflowClient", run_id: str) -> KnownRun:
    """Look a run up by its ID; for one that `mlflow run` made, the run that stands in its place.

    Raises:
        TrackingError: there is no such run, or the store does not answer.
    """
    with mlflow_errors(f"read run {run_id} in {redact(client.tracking_uri)}"):
        run = client.get_run(run_id)
        continued = run.data.tags.get(CONTINUES_TAG)
        return _known(run if continued is None else client.get_run(continued))


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
    if not is_active(run) or LATEST_TAG in tags:
        return None
    try:
        config = json.loads(tags.get(CONFIG_TAG, ""))
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def is_unplaced(client: "MlflowClient", run_id: str) -> bool:
    """Whether `mlflow run` made a run in MLflow's own default experiment, as it does unless it is told another.

    Raises:
        TrackingError: the store does not answer.
    """
    with mlflow_errors(f"read run {run_id}"):
        return str(client.get_run(run_id).info.experiment_id) == MLFLOW_DEFAULT_EXPERIMENT_ID


def project_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return what the tags of a run that `mlflow run` made say of the project, for the run that takes its place."""
    return {name: value for name, value in tags.items() if name.startswith(_PROJECT_TAGS)}


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
        DeletedError: it, or its experiment, was deleted.
        TrackingError: there is no such run, or the store does not answer.
    """
    require_active_run(client, run_id)
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
    """The run that `mlflow run` created, or an evaluation's own, written to directly.

    Args:
        is_new: it was just created, and is RUNNING.

    As a context manager it ends the run: FINISHED, or `status`, at the end of the block; FAILED after an exception,
    KILLED after an interruption.
    """

    def __init__(self, client: "MlflowClient", run_id: str, *, tags: Mapping[str, str], is_new: bool = False) -> None:
        self.target = RunTarget(client, run_id, Path(), is_new=is_new)
        self.status: Status = "FINISHED"
        if is_new:
            return
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
            with impatient(), mlflow_errors(f"end run {self.target.run_id}"):
                self.target.client.set_terminated(self.target.run_id, status)
        except TrackingError as error:
            if status == "FINISHED":
                raise
            # What ended the run is what the caller must hear of first.
            logger.warning("the run's status could not be set: %s", error)
