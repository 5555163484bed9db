"""Writing a checkpoint to a folder."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from shufflenet_mlflow.checkpoints.manifest import (
    ARTIFACT_FOLDER,
    CheckpointManifest,
    finite,
    manifest_path,
    write_manifest,
)
from shufflenet_mlflow.checkpoints.names import checkpoint_name
from shufflenet_mlflow.checkpoints.plain import bare_state_dict, to_plain
from shufflenet_mlflow.checkpoints.schema import EMA_STATE_DICT, FORMAT_VERSION, STATE_DICT
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.runtime.files import sha256_of, sync_folder, write_atomically

logger = logging.getLogger(__name__)


class WrittenCheckpoint(NamedTuple):
    """A checkpoint that is on the disk."""

    path: Path
    manifest: CheckpointManifest


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


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A checkpoint that has yet to be written."""

    payload: dict[str, Any]
    """Plain containers, as they will be in the file."""
    iters: int
    tag: str
    val_top1: float | None

    @property
    def file_name(self) -> str:
        return checkpoint_name(self.iters, self.tag)


def prepare_checkpoint(
    state: Mapping[str, Any],
    iters: int,
    tag: str = "",
    *,
    epoch: int | None = None,
    loss: float | None = None,
    val_top1: float | None = None,
    run_id: str | None = None,
    as_plain: Callable[[Mapping[str, Any]], dict[str, Any]] = to_plain,
) -> PreparedCheckpoint:
    """Bring `state` into the form of the file; the arguments are those of `write_checkpoint`.

    Args:
        as_plain: makes it plain; by default the tensors stay those of `state`, where that is possible.

    Raises:
        CheckpointError: the state is not plain data, or `epoch`, `loss` or `val_top1` is no number.
        ConfigError: see `checkpoint_name`.
    """
    if not isinstance(state.get(STATE_DICT), Mapping):
        raise CheckpointError(
            f"a checkpoint needs a {STATE_DICT!r}; this state has {sorted(state)}", code="state-without-state-dict"
        )
    checkpoint_name(iters, tag)  # raises
    epoch = state.get("epoch") if epoch is None else epoch
    loss = state.get("loss") if loss is None else loss
    for name, value in (("epoch", epoch), ("loss", loss), ("val_top1", val_top1)):
        if not isinstance(value, (int, float, type(None))):
            raise CheckpointError(
                f"{name} is a {type(value).__name__}; give a number, such as {name}.item()", code="value-not-number"
            )
    payload = as_plain(
        {
            **state,
            **{key: bare_state_dict(state[key]) for key in (STATE_DICT, EMA_STATE_DICT) if key in state},
            "format_version": FORMAT_VERSION,
            "iters": iters,
            "epoch": epoch,
            "loss": loss,
            "run_id": run_id if run_id is not None else state.get("run_id"),
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    )
    return PreparedCheckpoint(payload, iters, tag, val_top1)


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
    """Write `state` to `directory` as `{tag}checkpoint-{iters:06}.pth.tar`, with its manifest beside it.

    The file appears under its name only when it is whole, flushed to the disk and read back equal.

    Args:
        state: the training state; holds at least `state_dict`.
        epoch: completed epochs; by default `state["epoch"]`.
        loss: the training loss; by default `state["loss"]`.
        val_top1: top-1 accuracy of this state on the validation set, 0..1; stands in the manifest only.
        run_id: the MLflow run it belongs to.

    Raises:
        CheckpointError: see `prepare_checkpoint`; or the file cannot be written, and checkpoints that were there
            before are intact.
        ConfigError: see `checkpoint_name`.
    """
    prepared = prepare_checkpoint(state, iters, tag, epoch=epoch, loss=loss, val_top1=val_top1, run_id=run_id)
    return write_prepared(prepared, directory)


def write_prepared(prepared: PreparedCheckpoint, directory: str | Path) -> WrittenCheckpoint:
    """The second half of `write_checkpoint`.

    Raises:
        CheckpointError: the file cannot be written; checkpoints that were there before are intact.
    """
    payload = prepared.payload
    directory = Path(directory)
    path = directory / prepared.file_name
    writers: list[_HashingWriter] = []

    def manifest() -> CheckpointManifest:
        return CheckpointManifest(
            path=f"{ARTIFACT_FOLDER}/{path.name}",
            iters=prepared.iters,
            epoch=payload["epoch"],
            loss=finite(payload["loss"]),
            val_top1=finite(prepared.val_top1),
            sha256=writers[0].digest.hexdigest(),
            bytes=writers[0].bytes,
        )

    def write(file: BinaryIO) -> None:
        writer = _HashingWriter(file)
        writers.append(writer)
        torch.save(payload, writer)  # type: ignore[arg-type]  # needs only `write` and `flush`
        file.flush()
        with open(file.name, "rb") as copy:
            if sha256_of(copy) != writer.digest.hexdigest():
                raise CheckpointError(f"{str(path)!r} did not read back as it was written", code="read-back-differs")
        if not replaces:  # a process that is killed now leaves a manifest without a file, never the reverse
            write_manifest(path, manifest())

    replaces = os.path.exists(path)  # unlike Path.exists, never raises
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if replaces and manifest_path(path).exists():
            # A manifest of other bytes must never stand beside the new file.
            manifest_path(path).unlink()
            sync_folder(directory)
        write_atomically(path, write)
        if replaces:
            write_manifest(path, manifest())
    except BaseException as error:
        if not replaces and not os.path.exists(path):
            with contextlib.suppress(OSError):
                manifest_path(path).unlink(missing_ok=True)
        failure = writers[0].failure if writers else None
        failure = failure or (error if isinstance(error, OSError) else None)
        if failure is None or not isinstance(error, (OSError, RuntimeError)):
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {str(path)!r}: {failure.strerror}; "
            "earlier checkpoints are intact, --save-dir takes another place",
            code="checkpoint-unwritable",
        ) from error
    written = manifest()
    logger.debug("wrote %s, %.1f MB, SHA-256 %s…", path, written.bytes / 1e6, written.sha256[:12])
    return WrittenCheckpoint(path, written)
