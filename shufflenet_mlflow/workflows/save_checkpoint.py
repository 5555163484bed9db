"""`save_checkpoint` for training scripts of your own: the original release's function, with MLflow."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG, CheckpointManifest
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import BusyError, JournalError, TrackingError
from shufflenet_mlflow.tracking.client import active_run_id, connect
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.delivery import deliver_now
from shufflenet_mlflow.tracking.journal import Journal, read_pending
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag
from shufflenet_mlflow.tracking.uris import stored_uri
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS


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
    higher than that of the best so far. It returns when all of that is done.

    Args:
        state: holds at least `state_dict`; tensors, numbers, text, lists and dicts only.
        iters: completed iterations.
        tag: put before the file name, such as `bnps-`.
        epoch: completed epochs; by default `state["epoch"]`, if it is there.
        loss: the training loss; by default `state["loss"]`, if it is there.
        val_top1: top-1 accuracy of this state on the validation set, 0..1.
        directory: the folder of the file, made if it is not there.
        run_id: the MLflow run; by default the active one, if any.
        tracking_uri: of the store that has the run; by default as MLflow does.

    Returns:
        The file.

    Raises:
        CheckpointError: the state is not plain data, or the file cannot be written.
        TrackingError: the file is on the disk, but MLflow did not take it. It is noted in the journal of
            `directory`: the next call, or `shufflenet sync`, brings it to the run.
    """
    run_id = run_id or active_run_id()
    path, manifest = write_checkpoint(
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
        _bring(manifest, run_id, Path(directory), tracking_uri)
    return path


def _bring(manifest: CheckpointManifest, run_id: str, directory: Path, tracking_uri: str | None) -> None:
    client = connect(tracking_uri)
    message = Checkpoint.of(manifest)
    failure: TrackingError | None = None
    try:
        if not read_pending(directory).entries:  # what waits there comes first
            failure = _try_at_once(message, manifest, RunTarget(client, run_id, directory))
            if failure is None:
                return
        with closing(Journal(directory)) as journal:
            journal.set_owner(run_id, stored_uri(client.tracking_uri))
            journal.append(run_id, message.kind, to_body(message))
            journal.sync()
            if failure is None:
                deliver_now(client, journal, MESSAGE_KINDS)
    except (BusyError, JournalError) as error:
        raise TrackingError(
            f"{failure or error}; the checkpoint {manifest.file_name} is on the disk", code="save-not-journaled"
        ) from error
    except TrackingError as error:
        failure = error
    if failure is not None:
        raise TrackingError(
            f"{failure}; the checkpoint {manifest.file_name} is on the disk, and `shufflenet sync {directory}` brings "
            "it to the run",
            failure.mlflow_code,
            code="save-not-delivered",
        ) from failure


def _try_at_once(message: Checkpoint, manifest: CheckpointManifest, target: RunTarget) -> TrackingError | None:
    """Send a message past the journal; return the error if it did not arrive."""
    try:
        latest = manifest_in_tag(target.read().data.tags, LATEST_TAG)
        # The history of all points need not be read: only this iteration's matter.
        target.seen = {} if latest is None or latest.iters != manifest.iters else _points_of(manifest.iters)
        message.send(target)
    except TrackingError as error:
        return error
    return None


def _points_of(iters: int) -> dict[str, set[int]]:
    return {"epoch": {iters}, "loss": {iters}}
