"""Messages to a run: plain data that can wait in the journal, each kind with the way it is sent.

Sending a message twice does no harm: the process may be killed after it has arrived and before that is noted. Metric
points of a step that the run already has are left out, artifacts and tags replace themselves, parameters are compared
first, and a run that was created is found by a tag.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG
from shufflenet_mlflow.errors import RefusedError, TrackingError
from shufflenet_mlflow.runtime.serialization import to_json
from shufflenet_mlflow.tracking.client import LOST_RACE, mlflow_errors
from shufflenet_mlflow.tracking.names import DATASET_CONTEXT_TAG, RESOLVED_PREFIX, RESUMED_FROM_ITERS_TAG
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import Message, RunTarget, manifest_in_tag
from shufflenet_mlflow.tracking.uris import is_server

LARGEST_NUMBER = 2**53
"""The largest whole number that every store takes."""

MOST_POINTS = 1000
"""Metric points that MLflow accepts in one request."""


_RACES = 5
"""Attempts to log a data set that other runs log at the same time."""


def now_ms() -> int:
    """Return milliseconds since the epoch, as in MLflow's time stamps."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class MetricPoints:
    """Metrics of one step."""

    kind: ClassVar[str] = "metrics"
    values: Mapping[str, float]
    step: int
    timestamp: int

    def send(self, target: RunTarget) -> None:
        self.send_all(target, [self])

    @staticmethod
    def send_all(target: RunTarget, steps: "Sequence[MetricPoints]") -> None:
        """Send several in as few requests as possible."""
        send_points(target, steps)


def send_points(target: RunTarget, steps: Sequence[MetricPoints], tags: Mapping[str, str] | None = None) -> None:
    """Log the points that the run does not have yet, in as few requests as possible.

    A resumed run repeats the iterations since its checkpoint, and MLflow would keep their points twice.

    Args:
        tags: set in the same request.
    """
    from mlflow.entities import Metric, RunTag

    seen = target.seen_steps()
    new: dict[tuple[str, int], Metric] = {}
    for points in steps:
        for name, value in points.values.items():
            if points.step not in seen.setdefault(name, set()):
                new.setdefault((name, points.step), Metric(name, float(value), points.timestamp, points.step))
    metrics = list(new.values())
    new_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
    for first in range(0, max(len(metrics), len(new_tags)), MOST_POINTS):
        batch = metrics[first : first + MOST_POINTS]
        try:
            with mlflow_errors(f"log metrics at step {steps[0].step}"):
                target.client.log_batch(target.run_id, metrics=batch, tags=new_tags)
        except TrackingError:
            target.seen = None  # they may have arrived nevertheless: what the run has is read again
            raise
        new_tags = []
        for metric in batch:
            seen[metric.key].add(metric.step)


@dataclass(frozen=True)
class Params:
    """Parameters, which cannot change.

    `mlflow run` logs its own, shell-quoted, before the run starts: if one differs, the value in force is logged beside
    it under `resolved/`.
    """

    kind: ClassVar[str] = "params"
    values: Mapping[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Params":
        """Make text without credentials of any values."""
        return cls({key: redact(str(value)) for key, value in values.items()})

    def send(self, target: RunTarget) -> None:
        from mlflow.entities import Param

        new = {}
        for key, text in self.values.items():
            if key not in target.params:
                new[key] = text
            elif target.params[key] != text and f"{RESOLVED_PREFIX}{key}" not in target.params:
                new[f"{RESOLVED_PREFIX}{key}"] = text
        if new:
            with mlflow_errors(f"log parameters of run {target.run_id}"):
                target.client.log_batch(target.run_id, params=[Param(key, value) for key, value in new.items()])
            target.params.update(new)


@dataclass(frozen=True)
class Tags:
    """Tags of the run."""

    kind: ClassVar[str] = "tags"
    values: Mapping[str, str]

    def send(self, target: RunTarget) -> None:
        target.set_tags(self.values)


@dataclass(frozen=True)
class TextArtifact:
    """A small file."""

    kind: ClassVar[str] = "text"
    path: str
    text: str

    @classmethod
    def of_json(cls, path: str, value: Any) -> "TextArtifact":
        """Make a JSON file of a plain value."""
        return cls(path, to_json(value))

    def send(self, target: RunTarget) -> None:
        # File names need not be valid Unicode.
        text = self.text.encode("utf-8", "backslashreplace").decode()
        with mlflow_errors(f"write {self.path} of run {target.run_id}"):
            target.artifacts.put_text(text, self.path)
        if is_server(target.client.tracking_uri):
            folder, _, name = self.path.rpartition("/")
            target.artifacts.check_arrived(folder, {name: len(text.encode())})


@dataclass(frozen=True)
class DatasetInput:
    """A set of images as an input of the run, identified by the digest of its content or of its listing."""

    kind: ClassVar[str] = "input"
    name: str
    digest: str
    root: str
    images: int
    classes: int
    context: str
    digest_of: str = "listing"
    """`content` or `listing`."""

    def send(self, target: RunTarget) -> None:
        for _ in range(_RACES):
            if self._has_arrived(target):
                return
            try:
                self._log(target)
            except TrackingError as error:
                if error.mlflow_code != LOST_RACE:  # another run has just logged the same data set
                    raise
            else:
                return
        self._log(target)

    def _has_arrived(self, target: RunTarget) -> bool:
        inputs = target.read().inputs
        return inputs is not None and any(
            (entry.dataset.name, entry.dataset.digest) == (self.name, self.digest)
            and self.context in [tag.value for tag in entry.tags]
            for entry in inputs.dataset_inputs
        )

    def _log(self, target: RunTarget) -> None:
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as Input

        dataset = Dataset(
            name=self.name,
            digest=self.digest,
            source_type="local",
            source=json.dumps({"uri": self.root}),
            profile=json.dumps({"images": self.images, "classes": self.classes, "digest_of": self.digest_of}),
        )
        with mlflow_errors(f"log the data set {self.name} of run {target.run_id}"):
            target.client.log_inputs(target.run_id, [Input(dataset, [InputTag(DATASET_CONTEXT_TAG, self.context)])])


@dataclass(frozen=True)
class Create:
    """A run that started while the server was away; sending it creates the run, see `make_run`."""

    kind: ClassVar[str] = "create"
    experiment: str | None
    experiment_id: str | None
    name: str
    tags: Mapping[str, str]
    start_time: int

    def send(self, target: RunTarget) -> None:
        raise AssertionError("a run that has not been created has no target")


@dataclass(frozen=True)
class Reopen:
    """The run continues, unless it was continued elsewhere meanwhile."""

    kind: ClassVar[str] = "reopen"
    tags: Mapping[str, str]

    def send(self, target: RunTarget) -> None:
        latest = manifest_in_tag(target.read_to_commit().data.tags, LATEST_TAG)
        since = self.tags.get(RESUMED_FROM_ITERS_TAG, "")
        if target.require_writer is None and latest is not None and since.isdecimal() and latest.iters > int(since):
            return
        with mlflow_errors(f"continue run {target.run_id}"):
            target.client.update_run(target.run_id, status="RUNNING")
        target.set_tags(self.tags)


@dataclass(frozen=True)
class Finish:
    """The run's status at its end, unless it was continued elsewhere meanwhile."""

    kind: ClassVar[str] = "finish"
    status: str
    end_time: int
    iters: int

    def send(self, target: RunTarget) -> None:
        if self.status not in ("FINISHED", "FAILED", "KILLED"):
            raise RefusedError(f"a run cannot end as {self.status!r}", code="journal-status")
        latest = manifest_in_tag(target.read_to_commit().data.tags, LATEST_TAG)
        if latest is not None and latest.iters > self.iters:
            return
        with mlflow_errors(f"end run {target.run_id}"):
            target.client.set_terminated(target.run_id, self.status, self.end_time)


def to_body(message: Message) -> dict[str, Any]:
    """Return plain data for the journal."""
    return asdict(message)  # type: ignore[call-overload, no-any-return]


def from_body(kinds: Mapping[str, type[Any]], kind: str, body: Mapping[str, Any]) -> Message:
    """Make the message of a journal entry; the inverse of `to_body`.

    Args:
        kinds: message classes by kind; see `shufflenet_mlflow.tracking.kinds`.

    Raises:
        RefusedError: its kind is unknown.
    """
    try:
        message: Message = kinds[kind](**body)
    except (KeyError, TypeError) as error:
        raise RefusedError(
            f"the journal has an unknown kind of entry, {kind!r}; upgrade this package",
            code="journal-entry-unknown",
        ) from error
    for name, hint in get_type_hints(type(message)).items():
        if get_origin(hint) is not ClassVar and not _fits(getattr(message, name), hint):
            raise RefusedError(
                f"the journal has a {kind} entry whose {name} cannot be used; this package did not write it",
                code="journal-entry-types",
            )
    return message


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of the type that a message's field has."""
    if hint is Any:
        return True
    if get_origin(hint) is Mapping:
        item = get_args(hint)[1]
        return isinstance(value, dict) and all(_fits(each, item) for each in value.values())
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    if args := get_args(hint):  # a union
        return any(_fits(value, each) for each in args)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint and not (hint is int and abs(value) > LARGEST_NUMBER)
