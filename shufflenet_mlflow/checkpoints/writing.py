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
from shufflenet_mlflow.checkpoints.plain import bare_state_dict, plain_number, to_plain
from shufflenet_mlflow.checkpoints.schema import EMA_STATE_DICT, FORMAT_VERSION, STATE_DICT
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.runtime.files import sha256_of, sync_folder, write_atomically

logger = logging.getLogger(__name__)


class WrittenCheckpoint(NamedTuple):
    """A checkpoint on the disk."""

    path: Path
    manifest: CheckpointManifest


class _HashingWriter:
    """A file that counts and hashes what is written to it, for comparison with what the disk then holds.

    `torch.save` replaces a failed write's error by one of its own, so the operating system's is kept as `failure`.
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


class Monitor(NamedTuple):
    """The metric that decides which checkpoint is the best."""

    name: str
    value: float | None
    mode: str
    """`max` or `min`."""


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A checkpoint ready to be written."""

    payload: dict[str, Any]
    """The content of the file, in plain containers."""
    iters: int
    tag: str
    val_top1: float | None
    monitor: Monitor | None = None

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
    monitor: Monitor | None = None,
    as_plain: Callable[[Mapping[str, Any]], dict[str, Any]] = to_plain,
) -> PreparedCheckpoint:
    """Bring `state` into the form of the file; arguments as for `write_checkpoint`.

    Args:
        as_plain: makes it plain. The default copies tensors only if it has to.

    Raises:
        CheckpointError: the state is not plain data, or `epoch`, `loss` or `val_top1` is not a number.
        ConfigError: see `checkpoint_name`.
    """
    if not isinstance(state.get(STATE_DICT), Mapping):
        raise CheckpointError(
            f"a checkpoint needs a {STATE_DICT!r}, or the network as 'model'; this state has {sorted(state)}",
            code="state-without-state-dict",
        )
    checkpoint_name(iters, tag)  # raises
    epoch = state.get("epoch") if epoch is None else epoch
    loss = state.get("loss") if loss is None else loss
    loss, val_top1 = plain_number(loss, "loss"), plain_number(val_top1, "val_top1")
    epoch = plain_number(epoch, "epoch")  # type: ignore[assignment]  # fractions of an epoch are kept
    if epoch is not None and epoch < 0:
        raise CheckpointError(f"epoch (={epoch}) must not be negative", code="epoch-negative")
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
    return PreparedCheckpoint(payload, iters, tag, val_top1, monitor)


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

    The file appears under its name only once it is whole, flushed to the disk and has read back equal.

    Args:
        state: the training state; holds at least `state_dict`.
        iters: completed iterations.
        tag: what to put before the name.
        epoch: completed epochs; by default `state["epoch"]`.
        loss: the training loss; by default `state["loss"]`.
        val_top1: top-1 accuracy of this state on the validation set, 0..1; written to the manifest only.
        directory: made if it does not exist.
        run_id: the MLflow run it belongs to; by default `state["run_id"]`.

    Raises:
        CheckpointError: see `prepare_checkpoint`; or the file cannot be written (earlier checkpoints are intact).
        ConfigError: see `checkpoint_name`.
    """
    prepared = prepare_checkpoint(state, iters, tag, epoch=epoch, loss=loss, val_top1=val_top1, run_id=run_id)
    return write_prepared(prepared, directory)


def write_prepared(prepared: PreparedCheckpoint, directory: str | Path) -> WrittenCheckpoint:
    """Write a prepared checkpoint, as `write_checkpoint` does.

    Raises:
        CheckpointError: the file cannot be written; earlier checkpoints are intact.
    """
    path = Path(directory) / prepared.file_name
    try:
        manifest = _write(prepared, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {str(path)!r}: {error.strerror}; "
            "earlier checkpoints are intact; choose another folder with --save-dir",
            code="checkpoint-unwritable",
        ) from error
    logger.debug("wrote %s, %.1f MB, SHA-256 %s…", path, manifest.bytes / 1e6, manifest.sha256[:12])
    return WrittenCheckpoint(path, manifest)


def _write(prepared: PreparedCheckpoint, path: Path) -> CheckpointManifest:
    """Write the file and its manifest so that no manifest ever lies beside a file of other bytes.

    A new file's manifest is written first: a process killed in between leaves a manifest without a file, never the
    reverse. A replaced file loses its manifest first and gets the new one last.
    """
    replaces = os.path.exists(path)  # unlike Path.exists, never raises
    manifests: list[CheckpointManifest] = []

    monitor = prepared.monitor

    def write(file: BinaryIO) -> None:
        sha256, size = _save(prepared.payload, file, path)
        manifest = CheckpointManifest(
            path=f"{ARTIFACT_FOLDER}/{path.name}",
            iters=prepared.iters,
            epoch=prepared.payload["epoch"],
            loss=finite(prepared.payload["loss"]),
            val_top1=finite(prepared.val_top1),
            sha256=sha256,
            bytes=size,
            monitor=monitor.name if monitor is not None else None,
            value=finite(monitor.value) if monitor is not None else None,
            mode=monitor.mode if monitor is not None else None,
        )
        manifests.append(manifest)
        if not replaces:
            write_manifest(path, manifest)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if replaces and manifest_path(path).exists():
            manifest_path(path).unlink()
            sync_folder(path.parent)
        write_atomically(path, write)
        [manifest] = manifests
        if replaces:
            write_manifest(path, manifest)
    except BaseException:
        if not replaces and not os.path.exists(path):
            with contextlib.suppress(OSError):
                manifest_path(path).unlink(missing_ok=True)
        raise
    return manifest


def _save(payload: Mapping[str, Any], file: BinaryIO, path: Path) -> tuple[str, int]:
    """Write the payload to `file` and read it back.

    Returns:
        SHA-256 and size.

    Raises:
        OSError: it cannot be written.
        CheckpointError: it did not read back equal; the message names `path`.
    """
    writer = _HashingWriter(file)
    try:
        torch.save(payload, writer)  # type: ignore[arg-type]  # needs only `write` and `flush`
    except RuntimeError as error:
        if writer.failure is None:
            raise
        raise writer.failure from error
    file.flush()
    with open(file.name, "rb") as copy:
        if sha256_of(copy) != writer.digest.hexdigest():
            raise CheckpointError(f"{str(path)!r} did not read back as it was written", code="read-back-differs")
    return writer.digest.hexdigest(), writer.bytes
