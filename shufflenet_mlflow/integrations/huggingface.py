"""Verified, tracked checkpoints in Hugging Face's `Trainer`: `HuggingFaceCheckpoint` among its callbacks.

Needs the extra `huggingface`.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import CheckpointError, ConfigError
from shufflenet_mlflow.integrations.latest import newest_checkpoint
from shufflenet_mlflow.workflows.save_checkpoint import CheckpointWriter, Mode, check_mode

try:
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "shufflenet_mlflow.integrations.huggingface needs Transformers: pip install 'shufflenet-mlflow[huggingface]'"
    ) from error

logger = logging.getLogger(__name__)


ENTRY = "huggingface"
"""The entry of a checkpoint that holds the Trainer's own files besides the weights, as bytes."""

_NOT_KEPT = {"training_args.bin"}
"""Pickles of code, which resuming does not read."""


class HuggingFaceCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Turn each checkpoint folder of the `Trainer` into one checkpoint file, verified and, with a run, in MLflow.

    `save_strategy` and `save_steps` decide when. The folder that the Trainer writes is deleted once the file is on the
    disk, unless `load_best_model_at_end` needs it. A resumed run goes on exactly as far as the Trainer's own folders
    do: weights, optimizer, schedule, scaler, random numbers and the place in the data.

    MLflow is never waited for longer than two seconds; see `save_checkpoint`.

    Args:
        directory: the folder of the files; by default `models/RUN_ID`, or `models` without a run.
        monitor: the metric of the evaluation that decides which checkpoint is the best, such as `eval_accuracy`.
        mode: whether high or low values of it are better.
        background: write and deliver in a thread.
        run_id: the MLflow run; by default the active one when training begins.
        tracking_uri: of the store that has the run; by default as MLflow does.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        monitor: str | None = None,
        mode: Mode = "max",
        background: bool = False,
        run_id: str | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        check_mode(mode)
        self.monitor, self.mode, self.background = monitor, mode, background
        self._directory, self._run_id, self._tracking_uri = directory, run_id, tracking_uri
        self._writer: CheckpointWriter | None = None
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self._packed: list[Path] = []
        self._warned = False

    def latest(self, ref: str | Path | None = None) -> str | None:
        """Return a folder for `Trainer.train(resume_from_checkpoint=...)` made of the newest checkpoint that verifies.

        It is deleted when training ends.

        Args:
            ref: a file, a folder, a run ID or another reference; by default this callback's folder and run.

        Returns:
            The folder; None if there is no checkpoint yet.

        Raises:
            CheckpointError: a `HuggingFaceCheckpoint` did not write it, or it is damaged.
            UnresolvedError, TrackingError: see `read_checkpoint`.
        """
        path = newest_checkpoint(ref, self._directory, self._run_id, self._tracking_uri)
        if path is None:
            return None
        self.close()
        unpacked = self._unpacked = tempfile.TemporaryDirectory(prefix="shufflenet-resume-")
        try:
            unpack(path, Path(unpacked.name))
        except BaseException:
            self.close()
            raise
        return unpacked.name

    # The Trainer's hooks, in the order in which they are called

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fsdp or args.deepspeed:
            raise ConfigError(
                "HuggingFaceCheckpoint saves whole weights, which FSDP and DeepSpeed divide; leave it out there",
                code="trainer-weights-divided",
            )
        self._writer = CheckpointWriter(self._directory, run_id=self._run_id, tracking_uri=self._tracking_uri)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _wait_for_all()  # each process has written its random state
        if state.is_world_process_zero and self._writer is not None:
            metrics = _metrics_at(state)
            self._writer.save(
                pack(folder),
                state.global_step,
                epoch=int(state.epoch or 0),
                metrics=metrics,
                monitor=self._monitor_in(metrics),
                mode=self.mode,
                wait=not self.background,
            )
            if not args.load_best_model_at_end:
                self._packed.append(folder)
                self._delete_packed(keep=1 if self.background else 0)  # the last is not on the disk yet
        _wait_for_all()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is on the disk, and delete what `latest` has unpacked; the end of training does it."""
        writer, unpacked = self._writer, self._unpacked
        self._writer = self._unpacked = None
        if unpacked is not None:
            unpacked.cleanup()
        if writer is not None:
            writer.close()
            self._delete_packed()

    def _delete_packed(self, keep: int = 0) -> None:
        """Delete the Trainer's folders whose checkpoints are on the disk; keep so many of the newest."""
        while len(self._packed) > keep:
            shutil.rmtree(self._packed.pop(0), ignore_errors=True)

    def _monitor_in(self, metrics: Mapping[str, float]) -> str | None:
        if self.monitor is None or self.monitor in metrics:
            return self.monitor
        evaluated = [name for name in metrics if name.startswith("eval_")]
        if evaluated and not self._warned:
            self._warned = True
            logger.warning(
                "monitor=%r is not among the metrics (%s): none is the best", self.monitor, ", ".join(evaluated)
            )
        return None


def pack(folder: Path) -> dict[str, Any]:
    """Return the content of a Trainer's checkpoint folder as a state for `save_checkpoint`.

    Raises:
        CheckpointError: it holds no single file of weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if len(weights) != 1:
        raise CheckpointError(
            f"{str(folder)!r} holds {len(weights)} files of weights instead of one; raise max_shard_size",
            code="weights-in-parts",
        )
    files = {
        path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in {*_NOT_KEPT, weights[0].name} and path.stat().st_size
    }
    tensors = load_file(weights[0])
    return {
        "state_dict": tensors,
        ENTRY: {"weights": weights[0].name, "names": list(tensors), "files": files},
    }


def unpack(path: Path, folder: Path) -> None:
    """Write a Trainer's checkpoint folder from the file of a checkpoint.

    Raises:
        CheckpointError: a `HuggingFaceCheckpoint` did not write it, or it is damaged.
    """
    payload = read_checkpoint(path)
    entry = _trainer_entry(payload)
    if entry is None:
        raise CheckpointError(
            f"{str(path)!r} was not written by HuggingFaceCheckpoint; its weights alone are loaded by "
            "load_checkpoint(model, …)",
            code="not-of-trainer",
        )
    for name, content in entry["files"].items():
        (folder / name).write_bytes(content.numpy().tobytes())
    tensors = payload["state_dict"]
    save_file(dict(zip(entry["names"], tensors.values(), strict=True)), folder / entry["weights"], {"format": "pt"})


def _trainer_entry(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the Trainer's entry, if it has its form and names no file outside its folder."""
    entry = payload.get(ENTRY)
    if not (isinstance(entry, dict) and isinstance(entry.get("files"), dict)):
        return None
    names, contents = [entry.get("weights"), *entry["files"]], entry["files"].values()
    are_names = all(isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name for name in names)
    are_bytes = all(isinstance(content, Tensor) and content.dtype == torch.uint8 for content in contents)
    are_tensors = isinstance(entry.get("names"), list) and len(entry["names"]) == len(payload.get("state_dict", ()))
    return entry if are_names and are_bytes and are_tensors else None


def _metrics_at(state: TrainerState) -> dict[str, float]:
    """Return what the Trainer has logged at this step, as numbers."""
    metrics: dict[str, float] = {}
    for record in state.log_history:
        if record.get("step") == state.global_step:
            metrics |= {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}
    return {name: value for name, value in metrics.items() if name != "step"}


def _wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
