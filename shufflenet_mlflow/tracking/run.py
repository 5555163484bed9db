"""An MLflow run from beginning to end, with a status that is true whatever happens."""

import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import shufflenet_mlflow
from shufflenet_mlflow.checkpoint import LATEST_TAG
from shufflenet_mlflow.client import mlflow_errors, redact
from shufflenet_mlflow.config import DEFAULT_EXPERIMENT
from shufflenet_mlflow.data.folder import ImageListing
from shufflenet_mlflow.errors import ResumeError, TrackingError
from shufflenet_mlflow.stopping import StopRequested
from shufflenet_mlflow.tracking.delivery import tagged_record

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

RESOLVED_PREFIX = "resolved/"
"""Put before a parameter that `mlflow run` had logged in another spelling before the run began."""

RUN_ID_VARIABLE = "MLFLOW_RUN_ID"
"""How `mlflow run` tells its child which run it made for it."""


def adopted_run_id() -> str | None:
    """The run that `mlflow run` made for this process; asked once, so that no child adopts it too."""
    return os.environ.pop(RUN_ID_VARIABLE, None)


def git_commit() -> str | None:
    """The commit of the project's code, or else of the working directory's; None outside a checkout."""
    from mlflow.utils.git_utils import get_git_commit

    for folder in (str(Path(shufflenet_mlflow.__file__).parent), os.getcwd()):
        commit: str | None = get_git_commit(folder)
        if commit:
            return commit
    return None


def command_line() -> str:
    """This process's command, as it can be typed again, without credentials."""
    program = Path(sys.argv[0]).name
    words = ["shufflenet" if program == "__main__.py" else program, *sys.argv[1:]]
    return redact(shlex.join(words))


def environment_tags() -> dict[str, str]:
    """Versions, commit and user, as tags."""
    from mlflow.tracking.context import default_context

    tags = dict(default_context.DefaultRunContext().tags())  # type: ignore[no-untyped-call]
    tags["mlflow.source.name"] = command_line()
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    tags["version.python"] = platform.python_version()
    tags["version.shufflenet_mlflow"] = shufflenet_mlflow.__version__
    for package in ("torch", "torchvision", "mlflow"):
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:  # installed in some way that leaves no metadata
            continue
    return tags


def get_experiment_id(client: "MlflowClient", name: str) -> str:
    """The experiment's ID; it is made if it does not exist.

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
            f"{experiment.experiment_id}` brings it back, --experiment names another"
        )
    return str(experiment.experiment_id)


class TrackedRun:
    """One run, open for writing. As a context manager it ends the run with the status that is true:

    FINISHED at the end of the block, FAILED after an exception, KILLED after an interruption or if `status` was
    set to that.
    """

    def __init__(self, client: "MlflowClient", run: "Run") -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self.name: str = run.info.run_name
        self.experiment_id: str = run.info.experiment_id
        self.params: dict[str, str] = dict(run.data.params)
        self.metric_names = tuple(run.data.metrics)
        self.status: Status = "FINISHED"

    @classmethod
    def create(
        cls, client: "MlflowClient", *, experiment: str | None, name: str, tags: Mapping[str, str]
    ) -> "TrackedRun":
        """A new run.

        Args:
            experiment: by default `MLFLOW_EXPERIMENT_ID` or `MLFLOW_EXPERIMENT_NAME`, or else
                `DEFAULT_EXPERIMENT`.
        """
        experiment_id = None if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment_id:
            named = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
            experiment_id = get_experiment_id(client, named)
        with mlflow_errors("create a run"):
            run = client.create_run(
                experiment_id,
                run_name=name,
                tags={**environment_tags(), **tags},
                start_time=time.time_ns() // 1_000_000,
            )
        return cls(client, run)

    @classmethod
    def adopt(cls, client: "MlflowClient", run_id: str, *, name: str | None, tags: Mapping[str, str]) -> "TrackedRun":
        """The run that `mlflow run` made; what it knows of source and commit stands."""
        tracked = cls._reopen(client, run_id)
        own = {
            key: value
            for key, value in environment_tags().items()
            if not key.startswith(("mlflow.source", "mlflow.user"))
        }
        if name:
            own["mlflow.runName"] = name
        tracked.set_tags({**own, **tags})
        return tracked

    @classmethod
    def resume(cls, client: "MlflowClient", run_id: str, *, iters: int, may_rewind: bool) -> "TrackedRun":
        """A run that has ended or was cut off, to be continued from iteration `iters`.

        Args:
            may_rewind: its later checkpoints were found to be unusable, and may be written again.

        Raises:
            ResumeError: the store does not know the run, or the run has gone on beyond `iters`: continuing
                would write over what it has committed.
        """
        try:
            latest = tagged_record(client, run_id, LATEST_TAG)
            if latest is not None and latest.iters > iters and not may_rewind:
                raise ResumeError(
                    f"run {run_id} has gone on to iteration {latest.iters}, this checkpoint is of {iters}; "
                    f"--resume {run_id} continues it, --new-run with another --save-dir forks it here"
                )
            tracked = cls._reopen(client, run_id)
        except TrackingError as error:
            raise ResumeError(
                f"{error}; --new-run continues as a run of its own, --tracking-uri names another store"
            ) from error
        tracked.set_tags({"resumed.from_iters": str(iters)})
        return tracked

    @classmethod
    def _reopen(cls, client: "MlflowClient", run_id: str) -> "TrackedRun":
        with mlflow_errors(f"continue run {run_id} in {redact(client.tracking_uri)}"):
            run = client.get_run(run_id)
            if run.info.lifecycle_stage != "active":
                raise TrackingError(f"run {run_id} was deleted; `mlflow runs restore` brings it back")
            client.update_run(run_id, status="RUNNING")
        return cls(client, run)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set several tags in one request."""
        from mlflow.entities import RunTag

        with mlflow_errors(f"set tags of run {self.run_id}"):
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters that are not there yet.

        Parameters cannot change. `mlflow run` logs its own, shell-quoted, before the run begins: where such a
        one differs, the value in force stands beside it under `resolved/`.
        """
        from mlflow.entities import Param

        new = {}
        for key, value in params.items():
            text = redact(str(value))
            if key not in self.params:
                new[key] = text
            elif self.params[key] != text and f"{RESOLVED_PREFIX}{key}" not in self.params:
                new[f"{RESOLVED_PREFIX}{key}"] = text
        if new:
            with mlflow_errors(f"log parameters of run {self.run_id}"):
                self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in new.items()])
            self.params.update(new)

    def log_dict(self, value: Any, artifact: str) -> None:
        """Write a plain value as a JSON artifact."""
        with mlflow_errors(f"write {artifact} of run {self.run_id}"):
            self.client.log_dict(self.run_id, value, artifact)

    def log_dataset(self, listing: ImageListing, *, name: str, context: str) -> None:
        """Register a set of images as an input, identified by the digest of its listing."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=listing.digest,
            source_type="local",
            source=json.dumps({"uri": str(listing.root)}),
            profile=json.dumps({"images": len(listing), "classes": len(listing.classes)}),
        )
        with mlflow_errors(f"log the data set {name} of run {self.run_id}"):
            self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def logged_steps(self) -> dict[str, set[int]]:
        """Metric name -> the steps that have a point."""
        with mlflow_errors(f"read the metrics of run {self.run_id}"):
            return {
                name: {point.step for point in self.client.get_metric_history(self.run_id, name)}
                for name in self.metric_names
            }

    def finish(self, status: Status) -> None:
        """End the run."""
        with mlflow_errors(f"end run {self.run_id}"):
            self.client.set_terminated(self.run_id, status)

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            self.status = "KILLED" if issubclass(kind, (StopRequested, KeyboardInterrupt)) else "FAILED"
        try:
            self.finish(self.status)
        except TrackingError as error:
            if self.status == "FINISHED":
                raise
            # What ended the run is what the caller must hear of first.
            logger.warning("the run's status stays as it was: %s", error)
