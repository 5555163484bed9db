"""Checkpoints and metrics of a training run, on the disk and in MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoint import (
    LATEST_TAG,
    CheckpointRecord,
    read_record,
    update_record,
    write_checkpoint,
)
from shufflenet_mlflow.tracking.delivery import (
    BestMark,
    Checkpoint,
    Delivery,
    MetricPoints,
    checkpoint_points,
    now_ms,
    tagged_record,
)


class TrackedMetrics:
    """Sends metric points to the run, each (name, step) once.

    Args:
        logged: the steps that the run has already: a resumed run repeats the iterations since its checkpoint,
            and MLflow would keep their points twice.
    """

    def __init__(self, delivery: Delivery, logged: Mapping[str, set[int]]) -> None:
        self.delivery = delivery
        self._logged = {name: set(steps) for name, steps in logged.items()}

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """See `shufflenet_mlflow.train.MetricSink`."""
        points = self.new_points(values, iters)
        if points is not None:
            self.delivery.submit(points)

    def new_points(self, values: Mapping[str, float], iters: int) -> MetricPoints | None:
        """Those of the points that the run does not have; from now on it counts as having them."""
        new = {name: value for name, value in values.items() if iters not in self._logged.setdefault(name, set())}
        for name in new:
            self._logged[name].add(iters)
        return MetricPoints(new, iters, now_ms()) if new else None


class TrackedStore:
    """Keeps each checkpoint in `directory` first, then in the run."""

    def __init__(self, directory: Path, delivery: Delivery, metrics: TrackedMetrics) -> None:
        self.directory = directory
        self.delivery = delivery
        self.metrics = metrics

    def save(
        self,
        state: Mapping[str, Any],
        iters: int,
        tag: str,
        *,
        val_top1: float | None,
        best: bool,
    ) -> Path:
        """See `shufflenet_mlflow.train.CheckpointStore`."""
        path, record = write_checkpoint(
            state,
            iters,
            tag,
            val_top1=val_top1,
            directory=self.directory,
            run_id=self.delivery.run_id,
        )
        self._deliver(path, record, best)
        return path

    def mark_best(self, checkpoint: Path, val_top1: float) -> bool:
        """See `shufflenet_mlflow.train.CheckpointStore`."""
        record = update_record(checkpoint, val_top1=val_top1)
        if record is not None:
            self.delivery.submit(BestMark(checkpoint, record))
        return record is not None

    def deliver_again(self, path: Path, *, best: bool) -> None:
        """Bring a checkpoint that was resumed from to the run, unless the run has it or a later one.

        That is so when the server was away at the moment it was saved.
        """
        record = read_record(path)
        if record is None:
            return
        latest = tagged_record(self.delivery.client, self.delivery.run_id, LATEST_TAG)
        if latest is None or (latest.iters <= record.iters and latest.sha256 != record.sha256):
            self._deliver(path, record, best)

    def _deliver(self, path: Path, record: CheckpointRecord, best: bool) -> None:
        points = self.metrics.new_points(checkpoint_points(record), record.iters)
        self.delivery.submit(Checkpoint(path, record, best, points))
