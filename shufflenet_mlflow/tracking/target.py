"""The run that messages are sent to, and the protocol of a message."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, runtime_checkable

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.checkpoints.names import local_name
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.guarded import Guarded

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


JustWritten = dict[str, tuple[str, float]]
"""File name -> SHA-256 and `time.monotonic()` of when this process wrote the file and read it back."""


TRUST_SECONDS = 600.0
"""Seconds during which a file that was read back is uploaded without reading it again."""


class RunTarget:
    """A run that messages are sent to, with what is known about it.

    Args:
        directory: folder of its checkpoints.
        is_new: it was just created, and has no points yet.
    """

    def __init__(self, client: "MlflowClient", run_id: str, directory: Path, *, is_new: bool = False) -> None:
        self.client = client
        self.run_id = run_id
        self.directory = directory
        self.seen: dict[str, set[int]] | None = {} if is_new else None
        """Metric name -> steps that have a point; None until it is read."""
        self.artifacts = RunArtifacts(client, run_id)
        self.just_written: JustWritten = {}
        self.require_writer: Callable[[Mapping[str, str]], None] | None = None
        """Raises LostLeaseError if the run's tags, just read, say that another process has it; None without a lease."""

    def guard(self, check: Callable[[], object]) -> None:
        """Have `check` called before each request that changes something; it raises if this process no longer may."""
        self.client = cast("MlflowClient", Guarded(self.client, check))
        self.artifacts.guard(check)

    def read_to_commit(self) -> "Run":
        """Read the run just before what other commands rely on is changed.

        Raises:
            LostLeaseError: another process has taken it.
        """
        run = self.read()
        if self.require_writer is not None:
            self.require_writer(run.data.tags)
        return run

    def read(self) -> "Run":
        """Read the run."""
        with mlflow_errors(f"read run {self.run_id}"):
            return self.client.get_run(self.run_id)

    def seen_steps(self) -> dict[str, set[int]]:
        """Return the steps that have a point; they are read once."""
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
    """Plain data with a kind; `asdict` and the constructor are inverses of each other."""

    kind: ClassVar[str]

    def send(self, target: RunTarget) -> None:
        """Send it to the run.

        Raises:
            RefusedError: it will never arrive.
            TrackingError: it did not arrive this time.
        """


@runtime_checkable
class Joinable(Message, Protocol):
    """A message of which several go in one request."""

    @staticmethod
    def send_all(target: RunTarget, messages: "Sequence[Any]") -> None:
        """Send several of its kind, oldest first.

        Raises:
            RefusedError: one of them will never arrive.
            TrackingError: they did not arrive this time.
        """


def is_trusted(manifest: CheckpointManifest, just_written: JustWritten) -> bool:
    """Whether this process read the file back a moment ago."""
    sha256, when = just_written.get(local_name(manifest.file_name), ("", 0.0))
    return sha256 == manifest.sha256 and time.monotonic() - when < TRUST_SECONDS


def manifest_in_tag(tags: Mapping[str, str], tag: str) -> CheckpointManifest | None:
    """Return the manifest in `checkpoint.latest` or `checkpoint.best`; None if there is none, or it is invalid."""
    try:
        return CheckpointManifest.from_json(tags[tag]) if tag in tags else None
    except CheckpointError:  # someone edited the tag; the next commit replaces it
        return None
