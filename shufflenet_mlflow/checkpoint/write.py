"""Writing a checkpoint to a folder."""

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from shufflenet_mlflow.checkpoint.files import sha256_of, sync_folder, write_atomically
from shufflenet_mlflow.checkpoint.names import checkpoint_name
from shufflenet_mlflow.checkpoint.record import (
    ARTIFACT_FOLDER,
    CheckpointRecord,
    finite,
    record_path,
    write_record,
)
from shufflenet_mlflow.checkpoint.state import (
    FORMAT_VERSION,
    STATE_DICT,
    bare_state_dict,
    to_plain,
)
from shufflenet_mlflow.errors import CheckpointError


class WrittenCheckpoint(NamedTuple):
    """A checkpoint that is on the disk."""

    path: Path
    record: CheckpointRecord


class _HashingWriter:
    """Counts and hashes what passes through, so that the file can be compared with what was meant.

    `torch.save` reports a failed write in words of its own, so the operating system's error is kept.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(
    state: Mapping[str, Any],
    iters: int,
    tag: str = "",
    *,
    epoch: int | None = None,
    loss: float | None = None,
    val_top1: float | None = None,
    directory: str | Path = "./models",
    run_id: str | None = None,
) -> WrittenCheckpoint:
    """Write `state` to `directory` as `{tag}checkpoint-{iters:06}.pth.tar`, with its record beside it.

    The file appears under its name only when it is whole, flushed to the disk and read back equal.

    Args:
        state: the training state; holds at least `state_dict`.
        epoch: completed epochs; by default `state["epoch"]`.
        loss: the training loss; by default `state["loss"]`.
        run_id: the MLflow run it belongs to.

    Raises:
        CheckpointError: the state is not plain data, or the file cannot be written; checkpoints that were there
            before are intact.
    """
    if not isinstance(state.get(STATE_DICT), Mapping):
        raise CheckpointError(f"a checkpoint needs a {STATE_DICT!r}; this state has {sorted(state)}")
    epoch = state.get("epoch") if epoch is None else epoch
    loss = state.get("loss") if loss is None else loss
    payload = to_plain(
        {
            **state,
            STATE_DICT: bare_state_dict(state[STATE_DICT]),
            "format_version": FORMAT_VERSION,
            "iters": iters,
            "epoch": epoch,
            "loss": loss,
            "run_id": run_id if run_id is not None else state.get("run_id"),
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    )
    directory = Path(directory)
    path = directory / checkpoint_name(iters, tag)
    written: list[_HashingWriter] = []

    def write(file: BinaryIO) -> None:
        writer = _HashingWriter(file)
        written.append(writer)
        torch.save(payload, writer)  # type: ignore[arg-type]  # needs only `write` and `flush`
        file.flush()
        with open(file.name, "rb") as copy:
            if sha256_of(copy) != writer.digest.hexdigest():
                raise CheckpointError(f"{str(path)!r} did not read back as it was written")

    try:
        directory.mkdir(parents=True, exist_ok=True)
        if record_path(path).exists():
            # A record of other bytes must never stand beside the new file.
            record_path(path).unlink()
            sync_folder(directory)
        write_atomically(path, write)
        record = CheckpointRecord(
            path=f"{ARTIFACT_FOLDER}/{path.name}",
            iters=iters,
            epoch=epoch,
            loss=finite(loss),
            val_top1=finite(val_top1),
            sha256=written[0].digest.hexdigest(),
            bytes=written[0].bytes,
        )
        write_record(path, record)
    except (OSError, RuntimeError) as error:
        failure = written[0].failure if written else None
        failure = failure or (error if isinstance(error, OSError) else None)
        if failure is None:
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {str(path)!r}: {failure.strerror}; "
            "earlier checkpoints are intact, --save-dir takes another place"
        ) from error
    return WrittenCheckpoint(path, record)
