"""Messages for whatever an MLflow client logs to a run; see `tracking.durable_store`.

They mean what the client's calls mean: points of one step add up, and a parameter with another value is refused.
Sending one twice does no harm, for MLflow keeps one of several points with equal name, step, time stamp and value; all
else replaces itself. None of them looks for the run's writer, as MLflow's own client does not.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shufflenet_mlflow.errors import RefusedError, TrackingError
from shufflenet_mlflow.runtime.files import open_regular
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.target import RunTarget
from shufflenet_mlflow.tracking.uris import is_server

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModelInput, Metric

FILES_FOLDER = "files"
"""Folder beside the journal with copies of the files that are to be uploaded."""

SMALLEST, LARGEST = -(1 << 63), (1 << 63) - 1
"""Whole numbers that MLflow can take."""

_UNWANTED = ("HTTP_400", "HTTP_405", "HTTP_413", "HTTP_414", "HTTP_415", "HTTP_422")
"""Answers to an upload that say that this file will never be taken."""

_ENDED = ("FINISHED", "FAILED", "KILLED")
_STATUSES = ("RUNNING", "SCHEDULED", *_ENDED)
_ID = re.compile(r"[0-9a-f]{16}")

_LOST_IN_ADDRESS = re.compile(r"[#?]|%[0-9A-Fa-f]{2}")
"""MLflow puts names into addresses as they are: a server understands another one, or stops reading there."""

UPLOADS, PAUSE_SECONDS = 3, 1.0
"""Uploads of a file that the server takes and does not have afterwards, until what comes after it may go on."""


def is_artifact_name(path: str) -> bool:
    """Whether a server keeps an artifact under this path."""
    return path.isprintable() and _LOST_IN_ADDRESS.search(path) is None


@dataclass(frozen=True)
class LoggedBatch:
    """Points, parameters and tags of one call."""

    kind: ClassVar[str] = "batch"
    any_writer: ClassVar[bool] = True
    metrics: Sequence[Mapping[str, Any]]
    """Each with what `mlflow.entities.Metric` takes; without what is None."""
    params: Mapping[str, str]
    tags: Mapping[str, str]

    @classmethod
    def of(cls, metrics: "Sequence[Metric]", params: Mapping[str, str], tags: Mapping[str, str]) -> "LoggedBatch":
        """Make a message of MLflow's entities."""
        return cls([_plain(metric) for metric in metrics], params, tags)

    def send(self, target: RunTarget) -> None:
        self.send_all(target, [self])

    @staticmethod
    def send_all(target: RunTarget, batches: "Sequence[LoggedBatch]") -> None:
        """Send several in as few requests as possible.

        Raises:
            RefusedError: MLflow refuses one of them, or they contradict each other.
        """
        from mlflow.entities import Param, RunTag

        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for batch in batches:
            for key, value in batch.params.items():
                if params.setdefault(key, value) != value:
                    raise RefusedError(
                        f"the parameter {key} of run {target.run_id} is {params[key]!r}, and cannot become {value!r}",
                        code="logged-param-changed",
                    )
            tags.update(batch.tags)
        metrics = [_metric(values) for batch in batches for values in batch.metrics]
        with mlflow_errors(f"log to run {target.run_id}"):
            target.client.log_batch(
                target.run_id,
                metrics,
                [Param(key, value) for key, value in params.items()],
                [RunTag(key, value) for key, value in tags.items()],
            )


def _plain(metric: "Metric") -> dict[str, Any]:
    values = {
        "key": metric.key,
        "value": float(metric.value),
        "timestamp": metric.timestamp,
        "step": metric.step,
        "model_id": metric.model_id,
        "dataset_name": metric.dataset_name,
        "dataset_digest": metric.dataset_digest,
        "run_id": metric.run_id,
    }
    return {name: value for name, value in values.items() if value is not None}


_POINT = {"key": (str,), "value": (float, int), "timestamp": (int,), "step": (int,)}


def _metric(values: Mapping[str, Any]) -> "Metric":
    from mlflow.entities import Metric

    sound = all(type(values.get(name)) in types for name, types in _POINT.items())
    sound = sound and all(SMALLEST <= values[name] <= LARGEST for name in ("timestamp", "step"))
    if not sound or not all(isinstance(value, str) for name, value in values.items() if name not in _POINT):
        raise _unusable("point")
    try:
        return Metric(**values)
    except TypeError:  # a name that it does not have
        raise _unusable("point") from None


def _unusable(what: str) -> RefusedError:
    return RefusedError(
        f"the journal has a {what} that cannot be used; this package did not write it", code="journal-logged"
    )


@dataclass(frozen=True)
class LoggedInputs:
    """Data sets and models that the run uses."""

    kind: ClassVar[str] = "inputs"
    any_writer: ClassVar[bool] = True
    datasets: Sequence[Mapping[str, Any]]
    """Each with what `mlflow.entities.Dataset` takes, and `tags`."""
    models: Sequence[str]
    """Their IDs."""

    @classmethod
    def of(cls, datasets: "Sequence[DatasetInput]", models: "Sequence[LoggedModelInput]") -> "LoggedInputs":
        """Make a message of MLflow's entities."""
        plain = [{**dict(found.dataset), "tags": {tag.key: tag.value for tag in found.tags}} for found in datasets]
        return cls(plain, [model.model_id for model in models])

    def send(self, target: RunTarget) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        inputs = []
        for values in self.datasets:
            given = {name: value for name, value in values.items() if value is not None}
            tags = given.pop("tags", {})
            if not isinstance(tags, dict) or not all(
                isinstance(text, str) for text in (*given.values(), *tags.values())
            ):
                raise _unusable("data set")
            try:
                inputs.append(DatasetInput(Dataset(**given), [InputTag(key, text) for key, text in tags.items()]))
            except TypeError:  # a name that it does not have
                raise _unusable("data set") from None
        with mlflow_errors(f"log the inputs of run {target.run_id}"):
            target.client.log_inputs(target.run_id, inputs, [LoggedModelInput(model_id) for model_id in self.models])


@dataclass(frozen=True)
class RunUpdate:
    """Another status, end or name of the run; what is None stays as it is."""

    kind: ClassVar[str] = "update"
    any_writer: ClassVar[bool] = True
    status: str | None
    end_time: int | None
    name: str | None

    @property
    def is_end(self) -> bool:
        """Whether it ends the run."""
        return self.status in _ENDED

    def send(self, target: RunTarget) -> None:
        if self.status is not None and self.status not in _STATUSES:
            raise RefusedError(f"a run cannot be {self.status!r}", code="journal-run-status")
        status = None if self.is_end else self.status
        with mlflow_errors(f"update run {target.run_id}"):
            if self.is_end:
                target.client.set_terminated(target.run_id, self.status, self.end_time)
            if status is not None or self.name is not None:
                target.client.update_run(target.run_id, status, self.name)


@dataclass(frozen=True)
class LoggedFile:
    """A file that is to be uploaded; its copy waits in `FILES_FOLDER/ID/NAME`."""

    kind: ClassVar[str] = "file"
    any_writer: ClassVar[bool] = True
    id: str
    name: str
    folder: str
    """Its folder among the artifacts; may be empty."""

    @classmethod
    def copy_of(cls, path: Path, folder: str, directory: Path) -> "LoggedFile":
        """Copy a file to the journal in `directory`.

        Raises:
            OSError: it cannot be copied.
        """
        message = cls(secrets.token_hex(8), path.name, folder)
        copy = message._copy(directory)
        copy.parent.mkdir(parents=True)
        try:
            shutil.copyfile(path, copy)
        except BaseException:
            message.remove_copy(directory)
            raise
        return message

    def _copy(self, directory: Path) -> Path:
        return directory / FILES_FOLDER / self.id / self.name

    def remove_copy(self, directory: Path) -> None:
        """Remove the copy, if it is there."""
        copy = self._copy(directory)
        with contextlib.suppress(OSError):
            copy.unlink(missing_ok=True)
            copy.parent.rmdir()

    def send(self, target: RunTarget) -> None:
        copy = self._copy(target.directory)
        is_name = "/" not in self.name and os.sep not in self.name and self.name not in ("", ".", "..")
        if not is_name or _ID.fullmatch(self.id) is None or not _is_within(copy.parent, target.directory):
            raise RefusedError(f"{self.name!r} is not a file of the journal", code="journal-file-name")
        artifact = f"{self.folder}/{self.name}" if self.folder else self.name
        try:
            descriptor = open_regular(copy, os.O_RDONLY)
        except FileNotFoundError:
            if target.artifacts.has(artifact):  # the process was killed after it had arrived
                return
            raise RefusedError(f"the file {str(copy)!r} is missing", code="journal-file-missing") from None
        except OSError as error:
            raise RefusedError(
                f"the file {str(copy)!r} cannot be read: {error.strerror}", code="journal-file-unreadable"
            ) from error
        try:
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        for attempts_left in reversed(range(UPLOADS)):
            self._upload(target, copy, artifact)
            if self._has_arrived(target, size, is_last=attempts_left == 0):
                break
            time.sleep(PAUSE_SECONDS)
        self.remove_copy(target.directory)

    def _upload(self, target: RunTarget, copy: Path, artifact: str) -> None:
        try:
            with mlflow_errors(f"upload {artifact} of run {target.run_id}"):
                target.artifacts.put(copy, artifact)
        except TrackingError as error:
            if error.mlflow_code in _UNWANTED or target.artifacts.is_blocked(artifact):
                raise RefusedError(str(error), error.mlflow_code, code="logged-file-refused") from error
            raise

    def _has_arrived(self, target: RunTarget, size: int, *, is_last: bool) -> bool:
        """Whether the file is there; one that the server takes again and again and does not have is given up."""
        if not is_server(target.client.tracking_uri):
            return True
        try:
            target.artifacts.check_arrived(self.folder, {self.name: size})
        except TrackingError as error:
            if error.code != "artifact-not-arrived":
                raise
            if is_last:
                raise RefusedError(f"{error}, although MLflow took it", code="logged-file-lost") from error
            return False
        return True


def _is_within(folder: Path, directory: Path) -> bool:
    """Whether no link leads out of the journal's folder, which may come from a stranger."""
    return os.path.realpath(folder) == os.path.join(os.path.realpath(directory), *folder.relative_to(directory).parts)
