"""`save_checkpoint` and `CheckpointWriter` for training scripts of your own."""

import atexit
import contextlib
import logging
import operator
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.checkpoints.names import checkpoint_name
from shufflenet_mlflow.checkpoints.plain import plain_number, to_plain
from shufflenet_mlflow.checkpoints.references import default_folder, is_run_id
from shufflenet_mlflow.checkpoints.schema import is_own
from shufflenet_mlflow.checkpoints.staging import StagingBuffer
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.checkpoints.writing import Monitor, PreparedCheckpoint, prepare_checkpoint, write_prepared
from shufflenet_mlflow.errors import BusyError, CheckpointError, ConfigError, ShuffleNetError, TrackingError
from shufflenet_mlflow.runtime.jobs import Jobs
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.tracking import courier
from shufflenet_mlflow.tracking.client import active_run_id
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.messages import Tags
from shufflenet_mlflow.tracking.names import NETWORK_TAG
from shufflenet_mlflow.tracking.prune import Prune
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.own_state import complete_state

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

Mode = Literal["max", "min"]


def save_checkpoint(
    state: Mapping[str, Any],
    iters: int,
    tag: str = "",
    *,
    epoch: int | None = None,
    loss: float | None = None,
    val_top1: float | None = None,
    metrics: Mapping[str, float] | None = None,
    monitor: str | None = None,
    mode: Mode = "max",
    model: "nn.Module | None" = None,
    class_to_idx: Mapping[str, int] | Sequence[str] | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    background: bool = False,
    directory: str | Path | None = None,
    run_id: str | None = None,
    tracking_uri: str | None = None,
) -> Path:
    """Write `{directory}/{tag}checkpoint-{iters:06}.pth.tar` and, with a run, log it to MLflow.

    The file is whole, on the disk and read back equal before it takes its name. Then, if a run is active or `run_id`
    is given, it is uploaded as `checkpoints/<file>`, its metrics are logged at step `iters`, and last the run's tag
    `checkpoint.latest` moves to it; `checkpoint.best` too, if it is the best so far.

    With a tracking server, the call ends within two seconds, unless the disk alone takes longer. If MLflow is away,
    that is logged as a warning, once, and the checkpoint is noted in a journal beside the file: a later call, the end
    of the process, or `shufflenet sync` delivers it.

    Args:
        state: a dict with the network as `model`, or with its `state_dict`. Whatever has a `state_dict()` method, the
            optimizer for example, is written as its state dict, under its own key (the network's as `state_dict`); all
            else is tensors, numbers, text, lists and dicts. What `read_checkpoint` returns can be saved again.
        iters: completed iterations.
        tag: put before the file name, such as `bnps-`.
        epoch: completed epochs; by default `state["epoch"]`, if it is there.
        loss: the training loss; by default `metrics["loss"]` or `state["loss"]`, if it is there.
        val_top1: top-1 accuracy of this state on the validation set, 0..1.
        metrics: logged instead of `epoch` and `loss`. Numbers of Python's or numpy's, or tensors with one element.
        monitor: the metric, one of `metrics`, that decides which checkpoint is the best; by default `val_top1` does.
        mode: whether high or low values of it are better.
        model: the network, where the state has only its `state_dict`. A network that `create_model` has made is also
            described in the file, so that `eval`, `predict`, `promote` and `export` need no `--model`. If it no longer
            is that network, which a warning says, and for any other module, the file only serves to resume and compare.
        class_to_idx: names of the network's outputs, such as `dataset.class_to_idx`, or a list of them in order; by
            default `state["class_to_idx"]`, if it is there.
        preprocess: the input that you train with, as for `create_model`; by default `state["preprocess"]`, or what the
            network was made with.
        background: only copy the state, and write and deliver it in a thread. What goes wrong is raised by the next
            call, or logged at the end of the process.
        directory: the folder of the file, made if it is not there; by default `models/RUN_ID`, or `models` without a
            run.
        run_id: the MLflow run; by default the active one, if any.
        tracking_uri: of the store that has the run; by default as MLflow does.

    Returns:
        The file.

    Raises:
        CheckpointError: the state is not plain data or describes another network than it holds, the file cannot be
            written, or it exists and is another run's.
        ConfigError: `monitor` is not among the metrics, `mode` is neither `max` nor `min`, `preprocess` is not
            understood, or another argument is of no use.
        TrackingError: MLflow has refused the checkpoint, as for a run that it does not have, or another process is
            training the run; the file is on the disk, and `shufflenet sync` sends it later. Or the journal cannot be
            used.
    """
    writer = CheckpointWriter(directory, run_id=run_id, tracking_uri=tracking_uri)
    key = (str(writer.directory.absolute()), writer.run_id)
    with _mutex:
        writer = _in_background.setdefault(key, writer) if background else _in_background.get(key, writer)
    return writer.save(
        state,
        iters,
        tag,
        epoch=epoch,
        loss=loss,
        val_top1=val_top1,
        metrics=metrics,
        monitor=monitor,
        mode=mode,
        model=model,
        class_to_idx=class_to_idx,
        preprocess=preprocess,
        wait=not background,
    )


class CheckpointWriter:
    """Saves checkpoints in a thread: `save` copies the state and returns. As a context manager it ends with the block.

    There is memory for one copy: `save` waits until the checkpoint before it is on the disk. Everything is written and
    delivered in order. What goes wrong is raised by the next `save`, by `wait`, or at the end of the block.

    Args:
        directory: the folder of the files, made if it is not there; by default `models/RUN_ID`, or `models` without a
            run.
        run_id: the MLflow run; by default the active one, if any.
        tracking_uri: of the store that has the run; by default as MLflow does.
    """

    def __init__(
        self, directory: str | Path | None = None, *, run_id: str | None = None, tracking_uri: str | None = None
    ) -> None:
        if not isinstance(run_id, str | None):
            raise ConfigError(f"run_id (={run_id!r}) must be text, or None for the active run", code="run-id-type")
        self.run_id = run_id or active_run_id()
        self.directory = _folder(directory) if directory is not None else default_folder(self.run_id)
        self._tracking_uri = tracking_uri
        self._buffer = StagingBuffer()
        self._jobs: Jobs | None = None
        self._process = os.getpid()

    def save(
        self,
        state: Mapping[str, Any],
        iters: int,
        tag: str = "",
        *,
        epoch: int | None = None,
        loss: float | None = None,
        val_top1: float | None = None,
        metrics: Mapping[str, float] | None = None,
        monitor: str | None = None,
        mode: Mode = "max",
        model: "nn.Module | None" = None,
        class_to_idx: Mapping[str, int] | Sequence[str] | None = None,
        preprocess: str | Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> Path:
        """Copy the state, and have it written and delivered; arguments as for `save_checkpoint`.

        Args:
            wait: write and deliver it before returning, as `save_checkpoint` does, and without a copy.

        Returns:
            The file, which is there once `wait` has returned.

        Raises:
            CheckpointError, ConfigError, TrackingError: as `save_checkpoint`, for this checkpoint or an earlier one.
        """
        began = time.monotonic()
        iters = _whole(iters)
        self._forget_parent()
        wait = wait or _is_ending  # no thread outlives the end of the process
        if wait:
            self.wait()  # for earlier ones: in order
        elif self._jobs is None:
            self._jobs = Jobs("checkpoint writer")
            _with_thread.add(self)
        else:
            self._jobs.raise_failure()
        numbers = _plain_metrics(metrics)
        if self.run_id is not None:
            _claim(self.directory)
        self._require_own(self.directory / checkpoint_name(iters, tag))
        prepared = prepare_checkpoint(
            complete_state(state, model=model, class_to_idx=class_to_idx, preprocess=preprocess),
            iters,
            tag,
            epoch=epoch,
            loss=numbers["loss"] if loss is None and numbers and "loss" in numbers else loss,
            val_top1=val_top1,
            run_id=self.run_id,
            monitor=_monitor(numbers, monitor, mode),
            as_plain=to_plain if wait else self._buffer.take,
        )
        if wait:
            return self._write(prepared, numbers, began)
        assert self._jobs is not None  # noqa: S101 - begun above
        self._jobs.do(lambda: self._write_staged(prepared, numbers))
        return self.directory / prepared.file_name

    def wait(self) -> None:
        """Wait until everything given so far is on the disk and, if MLflow answers, in the run.

        Raises:
            CheckpointError, TrackingError: as `save_checkpoint`.
        """
        if self._jobs is not None:
            self._jobs.drain()

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        try:
            self.wait()
        finally:
            if self._jobs is not None:
                self._jobs.close()
                self._jobs = None
            _with_thread.discard(self)

    def _forget_parent(self) -> None:
        """In a forked process, leave the thread and the memory to the parent: neither is here."""
        if self._process != os.getpid():
            self._buffer, self._jobs, self._process = StagingBuffer(), None, os.getpid()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as own_error:
            if error is None:
                raise
            logger.warning("%s", own_error)  # the block's own error is the one to raise

    def _require_own(self, path: Path) -> None:
        """Raise CheckpointError if a file of that name is another run's."""
        owner = _owner_of(path) if os.path.exists(path) else None
        if owner is not None and owner != self.run_id:
            raise CheckpointError(
                f"{str(path)!r} belongs to run {owner}, and is not overwritten; give another directory=",
                code="checkpoint-of-other-run",
            )

    def _write_staged(self, prepared: PreparedCheckpoint, metrics: Mapping[str, float] | None) -> None:
        is_again = self._has(prepared)
        with _in_words_of_scripts():
            try:
                self._buffer.wait_until_copied()
                manifest = write_prepared(prepared, self.directory).manifest
            finally:
                self._buffer.release()
            self._bring(prepared, manifest, metrics, is_again=is_again)

    def _write(self, prepared: PreparedCheckpoint, metrics: Mapping[str, float] | None, began: float) -> Path:
        is_again = self._has(prepared)
        with _in_words_of_scripts():
            path, manifest = write_prepared(prepared, self.directory)
            self._bring(prepared, manifest, metrics, is_again=is_again, began=began)
        return path

    def _has(self, prepared: PreparedCheckpoint) -> bool:
        return os.path.exists(self.directory / prepared.file_name)

    def _bring(
        self,
        prepared: PreparedCheckpoint,
        manifest: CheckpointManifest,
        metrics: Mapping[str, float] | None,
        *,
        is_again: bool,
        began: float | None = None,
    ) -> None:
        if self.run_id is None:
            return
        messages: list[Message] = [Checkpoint.of(manifest, metrics=metrics)]
        model = prepared.payload.get("model")
        if model is not None and _named.get(self.run_id) != model["name"]:
            messages.insert(0, Tags({NETWORK_TAG: model["name"]}))
            _named[self.run_id] = model["name"]
        if is_again:  # the run may have an earlier attempt at it
            messages.append(Prune(None, None, None))
        courier.bring(
            self.directory,
            self.run_id,
            messages,
            manifest,
            tracking_uri=self._tracking_uri,
            kinds=MESSAGE_KINDS,
            began=began,
        )


@contextmanager
def _in_words_of_scripts() -> Iterator[None]:
    """Have errors name the argument of `save_checkpoint`, not the option of the command line."""
    try:
        yield
    except ShuffleNetError as error:
        error.args = (str(error).replace("choose another folder with --save-dir", "give another directory="),)
        raise


def _claim(directory: Path) -> None:
    """Keep a run's folder for this process until it ends: two that save there would overwrite each other's files.

    Raises:
        TrackingError: another process saves there.
    """
    name = os.path.realpath(directory)
    if name in _claimed:
        return
    with contextlib.suppress(OSError):  # no locks there, or no folder, which writing will say
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _claimed[name] = FileLock(directory / WRITER_LOCK, f"the folder {str(directory)!r}")
        except BusyError as error:
            raise TrackingError(
                f"{error}, or give another directory=; nothing was written", code="save-folder-busy"
            ) from error


def _folder(directory: str | Path) -> Path:
    try:
        folder = Path(directory)
    except TypeError:
        raise ConfigError(f"directory (={directory!r}) must be a path", code="directory-type") from None
    if "\0" in str(folder):
        raise ConfigError(f"directory (={str(folder)!r}) holds a NUL character", code="directory-nul")
    return folder


def _owner_of(path: Path) -> str | None:
    """Return the run that a checkpoint belongs to; None without one, or if the file is damaged."""
    try:
        payload = read_checkpoint(path)
    except CheckpointError:
        return None
    run_id = payload.get("run_id") if is_own(payload) else None
    return run_id if isinstance(run_id, str) and is_run_id(run_id) else None  # scripts have entries of that name


def _whole(iters: Any) -> Any:
    """Return a whole number of numpy or torch as Python's; anything else as it is, to be refused by name."""
    if isinstance(iters, bool):
        return iters
    try:
        return operator.index(iters)
    except (TypeError, ValueError, RuntimeError):
        return iters


def _plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return the metrics as numbers; those that are None are left out.

    Raises:
        CheckpointError: one is no number.
    """
    if metrics is None:
        return None
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics (={metrics!r}) must be a dict: name -> number", code="metrics-not-dict")
    numbers = {str(name): plain_number(value, f"metrics[{name!r}]") for name, value in metrics.items()}
    return {name: float(number) for name, number in numbers.items() if number is not None}


def check_mode(mode: str) -> None:
    """Raise ConfigError unless `mode` says whether high or low values are better."""
    if mode not in ("max", "min"):
        raise ConfigError(f"mode (={mode!r}) must be 'max' or 'min'", code="monitor-mode")


def _monitor(metrics: Mapping[str, float] | None, monitor: str | None, mode: str) -> Monitor | None:
    check_mode(mode)
    if monitor is None:
        return None
    if metrics is None or monitor not in metrics:
        raise ConfigError(
            f"monitor (={monitor!r}) must be one of the metrics: {', '.join(metrics or ()) or 'there are none'}",
            code="monitor-not-metric",
        )
    return Monitor(monitor, metrics[monitor], mode)


WRITER_LOCK = "writer.lock"
"""File in a run's folder that the process locks which saves there."""

_claimed: dict[str, FileLock] = {}
"""Folder -> its lock."""
_named: dict[str, str] = {}
"""Run -> its network, as its tag says."""
_in_background: dict[tuple[str, str | None], CheckpointWriter] = {}
"""Folder and run -> what `save_checkpoint(background=True)` writes with."""
_mutex = threading.Lock()


_with_thread: set[CheckpointWriter] = set()
"""Writers that have a thread, which the end of the process must wait for."""
_is_ending = False


def _close_all() -> None:
    """Write what is left at the end of the process; from now on, nothing is written in the background."""
    global _is_ending
    _is_ending = True
    _in_background.clear()
    while _with_thread:
        writer = _with_thread.pop()
        if writer._process == os.getpid() and writer._jobs is not None:
            writer._jobs.close()  # logs what went wrong


getattr(threading, "_register_atexit", atexit.register)(_close_all)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_claimed.clear)  # the locks are the parent's
