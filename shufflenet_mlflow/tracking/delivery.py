"""What is to reach MLflow, in order, without training having to wait or to end for it.

Everything is first put into a queue as plain data, with the time it happened, and then sent. What cannot be sent
stays at the head of the queue and is tried again with the next thing that comes, after a pause. Sending twice does
no harm: artifacts and tags replace themselves, and MLflow keeps one of two metric points that are equal in step,
time and value.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.checkpoint import (
    ARTIFACT_FOLDER,
    BEST_TAG,
    LATEST_TAG,
    CheckpointRecord,
    record_path,
)
from shufflenet_mlflow.client import mlflow_errors
from shufflenet_mlflow.errors import CheckpointError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

RETRY_SECONDS = 15.0
"""After a failure, at least this long passes before the next attempt."""


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow's time stamps are."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class MetricPoints:
    """Metrics of one step."""

    values: Mapping[str, float]
    step: int
    timestamp: int

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Log them in one request."""
        from mlflow.entities import Metric

        metrics = [Metric(name, float(value), self.timestamp, self.step) for name, value in self.values.items()]
        with mlflow_errors(f"log metrics at step {self.step}"):
            client.log_batch(run_id, metrics=metrics)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file with its record: the artifact, the metrics `epoch` and `loss`, then the tags.

    The tags are set last: they are the commit, and never name what is not there. `checkpoint.latest` never moves
    to an earlier iteration.
    """

    path: Path
    record: CheckpointRecord
    best: bool
    points: MetricPoints | None
    """`epoch` and `loss`; None if this iteration has them already."""

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Upload, then commit."""
        name = self.path.name
        with mlflow_errors(f"upload the checkpoint {name}"):
            client.log_artifact(run_id, str(self.path), ARTIFACT_FOLDER)
            client.log_artifact(run_id, str(record_path(self.path)), ARTIFACT_FOLDER)
        if self.points is not None:
            self.points.send(client, run_id)
        latest, best = (tagged_record(client, run_id, tag) for tag in (LATEST_TAG, BEST_TAG))
        with mlflow_errors(f"commit the checkpoint {name}"):
            if self.best or (best is not None and best.path == self.record.path):
                client.set_tag(run_id, BEST_TAG, self.record.to_json())
            if latest is None or latest.iters <= self.record.iters:
                client.set_tag(run_id, LATEST_TAG, self.record.to_json())


@dataclass(frozen=True)
class BestMark:
    """A checkpoint that had been delivered before it turned out to be the best."""

    path: Path
    record: CheckpointRecord

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Renew the record, then the tags; the file itself stays as it is."""
        latest = tagged_record(client, run_id, LATEST_TAG)
        with mlflow_errors(f"mark the checkpoint {self.path.name} as the best"):
            client.log_artifact(run_id, str(record_path(self.path)), ARTIFACT_FOLDER)
            client.set_tag(run_id, BEST_TAG, self.record.to_json())
            if latest is not None and latest.path == self.record.path:
                client.set_tag(run_id, LATEST_TAG, self.record.to_json())


def checkpoint_points(record: CheckpointRecord) -> dict[str, float]:
    """The metrics that go with every checkpoint."""
    values = {"epoch": record.epoch, "loss": record.loss}
    return {name: float(value) for name, value in values.items() if value is not None}


def tagged_record(client: "MlflowClient", run_id: str, tag: str) -> CheckpointRecord | None:
    """What `checkpoint.latest` or `checkpoint.best` says; None if it is not there, or not a record.

    Raises:
        TrackingError: MLflow did not answer.
    """
    with mlflow_errors(f"read run {run_id}"):
        text = client.get_run(run_id).data.tags.get(tag)
    try:
        return CheckpointRecord.from_json(text) if text else None
    except CheckpointError:  # someone edited the tag: the next commit mends it
        return None


Message = MetricPoints | Checkpoint | BestMark


class Delivery:
    """The queue of one run.

    Args:
        warn: told once when sending begins to fail, and `note` once when it works again.
    """

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        *,
        warn: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        self.client = client
        self.run_id = run_id
        self._warn, self._note = warn, note
        self._pending: deque[Message] = deque()
        self._retry_at: float | None = None

    @property
    def pending(self) -> int:
        """How many messages have not arrived."""
        return len(self._pending)

    def submit(self, message: Message) -> None:
        """Queue a message, and send what can be sent."""
        self._pending.append(message)
        if self._retry_at is None or time.monotonic() >= self._retry_at:
            self._send()

    def _send(self) -> TrackingError | None:
        failing = self._retry_at is not None
        while self._pending:
            try:
                self._pending[0].send(self.client, self.run_id)
            except TrackingError as error:
                if not failing:
                    self._warn(f"{error}; training goes on, and this is sent again later")
                self._retry_at = time.monotonic() + RETRY_SECONDS
                return error
            self._pending.popleft()
        if failing:
            self._note("MLflow answers again; what was waiting has been sent")
        self._retry_at = None
        return None

    def flush(self) -> None:
        """Send everything.

        Raises:
            TrackingError: something could not be sent.
        """
        error = self._send()
        if error is not None:
            raise TrackingError(
                f"{error}; {self.pending} messages to run {self.run_id} were not delivered, the checkpoints on "
                "the disk are complete"
            ) from error
