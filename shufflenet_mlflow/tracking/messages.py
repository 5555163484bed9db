"""What can be said to a run: plain data that can wait in the journal, each kind with the way it is sent.

Sending twice does no harm. A process may be killed between the arrival of a message and the moment it notes that,
and then sends it again: metric points of a step that the run has are left out, artifacts and tags replace
themselves, parameters are compared first, and a run that was made is found again by a tag.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointRecord, read_record
from shufflenet_mlflow.checkpoints.names import newest_first
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from shufflenet_mlflow.client import mlflow_errors, redact
from shufflenet_mlflow.errors import CheckpointError, RefusedError
from shufflenet_mlflow.resolve.artifacts import RunArtifacts
from shufflenet_mlflow.runtime.serialization import to_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RESOLVED_PREFIX = "resolved/"
"""Put before a parameter that `mlflow run` had logged in another spelling before the run began."""

SPOOL_TAG = "spool.id"
"""Tag of a run that began while the server was away: what it was called then."""

MOST_POINTS = 1000
"""MLflow takes so many in one request."""


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow's time stamps are."""
    return time.time_ns() // 1_000_000


JustWritten = dict[str, tuple[str, float]]
"""File name -> SHA-256 and `time.monotonic()` of when this process wrote it and read it back."""

TRUST_SECONDS = 600.0
"""For so long a file that was read back is not read once more before it is uploaded."""


class RunTarget:
    """A run that messages are sent to, with what is known of it.

    Args:
        directory: where its checkpoints lie on the disk.
        is_new: it was made just now: it has no points yet.
    """

    def __init__(self, client: "MlflowClient", run_id: str, directory: Path, *, is_new: bool = False) -> None:
        self.client = client
        self.run_id = run_id
        self.directory = directory
        self.seen: dict[str, set[int]] | None = {} if is_new else None
        """Metric name -> the steps that have a point; None until it is asked for."""
        self.artifacts = RunArtifacts(client, run_id)
        self.just_written: JustWritten = {}

    def read(self) -> "Run":
        """The run as it is now."""
        with mlflow_errors(f"read run {self.run_id}"):
            return self.client.get_run(self.run_id)

    def seen_steps(self) -> dict[str, set[int]]:
        """The steps that have a point; read once."""
        if self.seen is None:
            names = list(self.read().data.metrics)
            with mlflow_errors(f"read the metrics of run {self.run_id}"):
                self.seen = {
                    name: {point.step for point in self.client.get_metric_history(self.run_id, name)} for name in names
                }
        return self.seen

    @cached_property
    def params(self) -> dict[str, str]:
        """Parameters by name; read once."""
        return dict(self.read().data.params)

    def set_tag(self, key: str, value: str) -> None:
        """Set one tag."""
        with mlflow_errors(f"set the tag {key} of run {self.run_id}"):
            self.client.set_tag(self.run_id, key, value)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set several tags in one request."""
        from mlflow.entities import RunTag

        if tags:
            with mlflow_errors(f"set tags of run {self.run_id}"):
                self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


class Message(Protocol):
    """Plain data with a kind; `asdict` and the constructor are each other's inverse."""

    kind: ClassVar[str]

    def send(self, target: RunTarget) -> None:
        """Bring it to the run.

        Raises:
            RefusedError: it will never arrive.
            TrackingError: it did not arrive now.
        """


@dataclass(frozen=True)
class MetricPoints:
    """Metrics of one step."""

    kind: ClassVar[str] = "metrics"
    values: Mapping[str, float]
    step: int
    timestamp: int

    def send(self, target: RunTarget) -> None:
        send_points(target, [self])


def send_points(target: RunTarget, several: Sequence[MetricPoints], tags: Mapping[str, str] | None = None) -> None:
    """Log the points that the run does not have yet, in as few requests as possible.

    A resumed run repeats the iterations since its checkpoint, and MLflow would keep their points twice.

    Args:
        tags: set in the same request.
    """
    from mlflow.entities import Metric, RunTag

    seen = target.seen_steps()
    new: dict[tuple[str, int], Metric] = {}
    for points in several:
        for name, value in points.values.items():
            if points.step not in seen.setdefault(name, set()):
                new.setdefault((name, points.step), Metric(name, float(value), points.timestamp, points.step))
    metrics = list(new.values())
    waiting = [RunTag(key, value) for key, value in (tags or {}).items()]
    for first in range(0, max(len(metrics), len(waiting)), MOST_POINTS):
        batch = metrics[first : first + MOST_POINTS]
        with mlflow_errors(f"log metrics at step {several[0].step}"):
            target.client.log_batch(target.run_id, metrics=batch, tags=waiting)
        waiting = []
        for metric in batch:
            seen[metric.key].add(metric.step)


@dataclass(frozen=True)
class Params:
    """Parameters, which cannot change.

    `mlflow run` logs its own, shell-quoted, before the run begins: where such a one differs, the value in force
    stands beside it under `resolved/`.
    """

    kind: ClassVar[str] = "params"
    values: Mapping[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Params":
        """Any values, as text without credentials."""
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
        """A plain value as a JSON file."""
        return cls(path, to_json(value))

    def send(self, target: RunTarget) -> None:
        # Names of files need not be valid text.
        text = self.text.encode("utf-8", "backslashreplace").decode()
        with mlflow_errors(f"write {self.path} of run {target.run_id}"):
            target.client.log_text(target.run_id, text, self.path)


@dataclass(frozen=True)
class DatasetInput:
    """A set of images as an input of the run, identified by the digest of its content, or else of its listing."""

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
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as Input

        inputs = target.read().inputs
        if inputs is not None and any(
            (known.dataset.name, known.dataset.digest) == (self.name, self.digest)
            and self.context in [tag.value for tag in known.tags]
            for known in inputs.dataset_inputs
        ):
            return
        dataset = Dataset(
            name=self.name,
            digest=self.digest,
            source_type="local",
            source=json.dumps({"uri": self.root}),
            profile=json.dumps({"images": self.images, "classes": self.classes, "digest_of": self.digest_of}),
        )
        with mlflow_errors(f"log the data set {self.name} of run {target.run_id}"):
            target.client.log_inputs(target.run_id, [Input(dataset, [InputTag("mlflow.data.context", self.context)])])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file with its record: the artifacts, the metrics `epoch` and `loss`, then the tags.

    The tags are set last: they are the commit, and never name what is not there. `checkpoint.latest` never moves
    to an earlier iteration, `checkpoint.best` never to a lower accuracy.
    """

    kind: ClassVar[str] = "checkpoint"
    record: Mapping[str, Any]
    timestamp: int
    again: bool = False
    """The run may have the file already."""
    unless_passed: bool = False
    """Not if the run's latest checkpoint is a newer one: then it had this, and it was pruned."""

    @classmethod
    def of(cls, record: CheckpointRecord, *, again: bool = False, unless_passed: bool = False) -> "Checkpoint":
        """The message for a checkpoint that is on the disk."""
        return cls(asdict(record), now_ms(), again, unless_passed)

    def send(self, target: RunTarget) -> None:
        """Upload, confirm, record, then commit."""
        record = CheckpointRecord(**self.record)
        artifacts, name = target.artifacts, record.file_name
        gone = self.again and not (target.directory / name).exists()  # pruned since this was noted
        if self.unless_passed or gone:
            latest = record_in(target.read().data.tags, LATEST_TAG)
            if latest is not None and newest_first({latest.file_name, name})[0] == latest.file_name:
                return
        there = artifacts.record_of(name) if self.again else None
        if there is None or there.sha256 != record.sha256:
            path = target.directory / name
            if not _is_to_be_sent(path, record, target.just_written):
                return
            with mlflow_errors(f"upload the checkpoint {name}"):
                artifacts.upload(path, record)
        if there != record:
            with mlflow_errors(f"upload the record of {name}"):
                artifacts.write_record(record)
        values = {"epoch": record.epoch, "loss": record.loss}
        points = {key: float(value) for key, value in values.items() if value is not None}
        tags = self._pointers(target, record)
        send_points(target, [MetricPoints(points, record.iters, self.timestamp)], tags)

    def _pointers(self, target: RunTarget, record: CheckpointRecord) -> dict[str, str]:
        """The tags that are to name this checkpoint from now on."""
        tags = target.read().data.tags
        latest, best = record_in(tags, LATEST_TAG), record_in(tags, BEST_TAG)
        moved = {}
        if is_better(record, best):
            moved[BEST_TAG] = record.to_json()
        if latest != record and (latest is None or latest.iters <= record.iters):
            moved[LATEST_TAG] = record.to_json()
        return moved


def is_trusted(record: CheckpointRecord, just_written: JustWritten) -> bool:
    """Whether this process read the file back a moment ago."""
    sha256, when = just_written.get(record.file_name, ("", 0.0))
    return sha256 == record.sha256 and time.monotonic() - when < TRUST_SECONDS


def _is_to_be_sent(path: Path, record: CheckpointRecord, just_written: JustWritten) -> bool:
    """Whether the file is what its record says; False if a later one has taken its name.

    Raises:
        RefusedError: it is damaged, or gone.
    """
    if is_trusted(record, just_written) and path.exists():
        return True
    try:
        verify_checkpoint(path, record)
    except CheckpointError as error:
        now = read_record(path)
        if now is not None and now.sha256 != record.sha256:
            return False  # it was written again, and that one waits behind this
        raise RefusedError(f"the checkpoint cannot be sent to the run: {error}") from error
    return True


def record_in(tags: Mapping[str, str], tag: str) -> CheckpointRecord | None:
    """What `checkpoint.latest` or `checkpoint.best` says; None if it is not there, or not a record."""
    try:
        return CheckpointRecord.from_json(tags[tag]) if tag in tags else None
    except CheckpointError:  # someone edited the tag: the next commit mends it
        return None


def is_better(record: CheckpointRecord, best: CheckpointRecord | None) -> bool:
    """Whether `checkpoint.best` is to move to `record`."""
    if best is not None and best.path == record.path:
        return best != record
    if record.val_top1 is None:
        return False
    return best is None or best.val_top1 is None or record.val_top1 > best.val_top1


@dataclass(frozen=True)
class Prune:
    """Delete the checkpoints that `Retention` drops, in the run and on the disk."""

    kind: ClassVar[str] = "prune"
    keep_last: int | None
    keep_best: int | None
    keep_every: int | None

    def send(self, target: RunTarget) -> None:
        from shufflenet_mlflow.tracking.prune import prune_run

        prune_run(target, Retention(self.keep_last, self.keep_best, self.keep_every))


@dataclass(frozen=True)
class Create:
    """A run that began while the server was away. Sending it makes the run: see `make_run`."""

    kind: ClassVar[str] = "create"
    experiment: str | None
    experiment_id: str | None
    name: str
    tags: Mapping[str, str]
    start_time: int

    def send(self, target: RunTarget) -> None:
        raise AssertionError("a run that is to be made has no target yet")


@dataclass(frozen=True)
class Reopen:
    """The run goes on."""

    kind: ClassVar[str] = "reopen"
    tags: Mapping[str, str]

    def send(self, target: RunTarget) -> None:
        with mlflow_errors(f"continue run {target.run_id}"):
            target.client.update_run(target.run_id, status="RUNNING")
        target.set_tags(self.tags)


@dataclass(frozen=True)
class Finish:
    """The run's status at its end, unless it has been continued elsewhere meanwhile."""

    kind: ClassVar[str] = "finish"
    status: str
    end_time: int
    iters: int

    def send(self, target: RunTarget) -> None:
        latest = record_in(target.read().data.tags, LATEST_TAG)
        if latest is not None and latest.iters > self.iters:
            return
        with mlflow_errors(f"end run {target.run_id}"):
            target.client.set_terminated(target.run_id, self.status, self.end_time)


KINDS: dict[str, type[Any]] = {
    kind.kind: kind
    for kind in (MetricPoints, Params, Tags, TextArtifact, DatasetInput, Checkpoint, Prune, Create, Reopen, Finish)
}


DEFINED_ELSEWHERE = {"note": "shufflenet_mlflow.tracking.note", "models": "shufflenet_mlflow.export.logged"}
"""Kind -> the module that registers it: who delivers a journal need not have imported what wrote it."""


def register_kind(kind: type[Any]) -> None:
    """Let the journal hold messages of a kind that is defined elsewhere: one of `DEFINED_ELSEWHERE`."""
    assert kind.kind in DEFINED_ELSEWHERE  # noqa: S101 - or another process would not understand it
    KINDS[kind.kind] = kind


def to_body(message: Message) -> dict[str, Any]:
    """Plain data for the journal."""
    return asdict(message)  # type: ignore[call-overload, no-any-return]


def from_body(kind: str, body: Mapping[str, Any]) -> Message:
    """The inverse of `to_body`.

    Raises:
        RefusedError: it is of no kind that is known here.
    """
    if kind not in KINDS and kind in DEFINED_ELSEWHERE:
        import_module(DEFINED_ELSEWHERE[kind])
    try:
        message: Message = KINDS[kind](**body)
    except (KeyError, TypeError) as error:
        raise RefusedError(
            f"the journal holds a {kind!r} entry that is not understood; upgrade this package"
        ) from error
    return message
