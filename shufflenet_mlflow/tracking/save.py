"""`save_checkpoint` for scripts of one's own: the original release's function, plus MLflow."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoint import (
    BEST_TAG,
    LATEST_TAG,
    CheckpointRecord,
    write_checkpoint,
)
from shufflenet_mlflow.client import connect
from shufflenet_mlflow.tracking.delivery import (
    Checkpoint,
    MetricPoints,
    checkpoint_points,
    now_ms,
    tagged_record,
)


def _active_run_id() -> str | None:
    """The run that `mlflow.start_run()` opened; there can be none before `mlflow` was imported."""
    if "mlflow" not in sys.modules:
        return None
    import mlflow

    active = mlflow.active_run()
    return active.info.run_id if active else None


def save_checkpoint(
    state: Mapping[str, Any],
    iters: int,
    tag: str = "",
    *,
    epoch: int | None = None,
    loss: float | None = None,
    val_top1: float | None = None,
    directory: str | Path = "./models",
    run_id: str | None = None,
    tracking_uri: str | None = None,
) -> Path:
    """Write `{directory}/{tag}checkpoint-{iters:06}.pth.tar` and, with a run, log it to MLflow.

    The file is whole, on the disk and read back equal before it takes its name. Then, if a run is active or
    `run_id` is given, it is uploaded as `checkpoints/<file>`, the metrics `epoch` and `loss` are logged at step
    `iters`, and last the run's tag `checkpoint.latest` moves to it; `checkpoint.best` too, if its `val_top1` is
    higher than that of the best so far.

    Args:
        state: holds at least `state_dict`; tensors, numbers, text, lists and dicts only.
        iters: completed iterations.
        tag: put before the file name, such as `bnps-`.
        epoch: completed epochs; by default `state["epoch"]`, if it is there.
        loss: the training loss; by default `state["loss"]`, if it is there.
        val_top1: top-1 accuracy of this state on the validation set, 0..1.
        run_id: the MLflow run; by default the active one, if any.
        tracking_uri: of the store that has the run; by default as MLflow does.

    Returns:
        The file.

    Raises:
        CheckpointError: the state is not plain data, or the file cannot be written.
        TrackingError: the file is on the disk, but MLflow did not take it.
    """
    run_id = run_id or _active_run_id()
    path, record = write_checkpoint(
        state,
        iters,
        tag,
        epoch=epoch,
        loss=loss,
        val_top1=val_top1,
        directory=directory,
        run_id=run_id,
    )
    if run_id is not None:
        client = connect(tracking_uri)
        latest = tagged_record(client, run_id, LATEST_TAG)
        points = None
        if latest is None or latest.iters != iters:  # else this iteration has its points
            points = MetricPoints(checkpoint_points(record), iters, now_ms())
        best = _is_better(record, tagged_record(client, run_id, BEST_TAG))
        Checkpoint(path, record, best, points).send(client, run_id)
    return path


def _is_better(record: CheckpointRecord, best: CheckpointRecord | None) -> bool:
    if record.val_top1 is None:
        return False
    return best is None or best.val_top1 is None or record.val_top1 > best.val_top1
