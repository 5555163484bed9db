"""Verified, tracked checkpoints in Lightning: `LightningCheckpoint` in place of `ModelCheckpoint`.

Needs the extra `lightning`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shufflenet_mlflow.checkpoints.plain import bare_key, to_plain
from shufflenet_mlflow.errors import CheckpointError, ConfigError
from shufflenet_mlflow.integrations import random_state
from shufflenet_mlflow.integrations.latest import newest_checkpoint
from shufflenet_mlflow.workflows.save_checkpoint import CheckpointWriter, Mode, check_mode

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.loggers import MLFlowLogger
except ImportError as error:
    raise ImportError(
        "shufflenet_mlflow.integrations.lightning needs Lightning: pip install 'shufflenet-mlflow[lightning]'"
    ) from error

logger = logging.getLogger(__name__)


class LightningCheckpoint(Checkpoint):  # type: ignore[misc]
    """Save a checkpoint after each epoch, verified on the disk and, with a run, in MLflow.

    The file is both this project's and Lightning's: `Trainer.fit(ckpt_path=...)` takes it. Besides what Lightning
    saves it holds the states of Python's, numpy's and PyTorch's random generators, and a run that ended within an epoch
    goes on with the batch after the last one, so that a resumed run in one process equals an uninterrupted one.
    With several processes only the order of the data does; the first process writes.

    MLflow is never waited for longer than two seconds; see `save_checkpoint`.

    Args:
        directory: the folder of the files; by default `models/RUN_ID`, or `models` without a run.
        every_n_steps: save every so many optimizer steps, too. On SIGTERM the step in progress is finished and saved.
        monitor: the logged metric that decides which checkpoint is the best.
        mode: whether high or low values of it are better.
        background: write and deliver in a thread.
        run_id: the MLflow run; by default that of the trainer's `MLFlowLogger`, or the active one.
        tracking_uri: of the store that has the run; by default the logger's, or as MLflow does.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: Mode = "max",
        background: bool = False,
        run_id: str | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps (={every_n_steps!r}) must be at least 1", code="every-n-steps")
        check_mode(mode)
        self.monitor, self.mode, self.background = monitor, mode, background
        self.every_n_steps = every_n_steps
        self.best_model_path = self.last_model_path = ""
        """Files of the best and of the newest checkpoint of this process, as `Trainer.fit` looks for them."""
        self._best: float | None = None
        self._directory, self._run_id, self._tracking_uri = directory, run_id, tracking_uri
        self._writer: CheckpointWriter | None = None
        self._restored: Mapping[str, Any] | None = None
        self._epoch_start: dict[str, Any] = {}
        self._trained_batches = self._saved_batches = 0
        self._warned: set[str] = set()

    def latest(self, ref: str | Path | None = None) -> str | None:
        """Return the newest checkpoint that verifies, for `Trainer.fit(ckpt_path=...)`; None if there is none yet.

        Args:
            ref: a file, a folder, a run ID or another reference; by default this callback's folder and run.

        Raises:
            UnresolvedError, CheckpointError, TrackingError: see `read_checkpoint`.
        """
        path = newest_checkpoint(ref, self._directory, self._run_id, self._tracking_uri)
        return None if path is None else str(path)

    # Lightning's hooks, in the order in which they are called

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _require_whole_weights(trainer)
        _require_bare_names(pl_module)
        run_id, uri = self._run_id, self._tracking_uri
        if run_id is None:
            for its_logger in trainer.loggers:
                if isinstance(its_logger, MLFlowLogger):
                    run_id, uri = its_logger.run_id, uri or its_logger._tracking_uri
        self._writer = CheckpointWriter(self._directory, run_id=run_id, tracking_uri=uri)
        _require_one_run(self._writer.run_id, trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "now": random_state.collect(),
            "epoch_start": self._epoch_start,
            "trained_batches": self._saved_batches,
            "best": self._best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        self._best = state_dict["best"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is not None and trainer.world_size == 1:
            random_state.restore(self._restored["now"])
        self._epoch_start = random_state.collect()
        self._trained_batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state, self._restored = self._restored, None
        if state is not None and state["trained_batches"]:
            self._epoch_start, self._trained_batches = state["epoch_start"], state["trained_batches"]
            if not _loaders_keep_state(trainer):
                _skip_batches(trainer, state)
            if trainer.world_size == 1:  # beginning the loaders has drawn from them
                random_state.restore(state["now"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trained_batches:  # of the epoch before; the first epoch's loader has been started already
            self._epoch_start = random_state.collect()
            self._trained_batches = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained_batches = batch_idx + 1
        is_due = (
            self.every_n_steps is not None
            and trainer.global_step % self.every_n_steps == 0
            and not trainer.fit_loop.epoch_loop._should_accumulate()
            and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # the end of the epoch follows
        )
        if is_due or trainer.received_sigterm:
            self._save(trainer, ends_epoch=trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, ends_epoch=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _save(self, trainer: pl.Trainer, *, ends_epoch: bool) -> None:
        self._saved_batches = 0 if ends_epoch else self._trained_batches
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # in every process: it may gather
        if not trainer.is_global_zero or self._writer is None:
            return
        self._leave_out_objects(state)
        metrics = _numbers(trainer.callback_metrics)
        monitor = self._monitor_in(metrics, trainer)
        path = self._writer.save(
            state,
            trainer.global_step,
            epoch=trainer.fit_loop.epoch_progress.current.processed,
            metrics=metrics,
            monitor=monitor,
            mode=self.mode,
            wait=not self.background,
        )
        self.last_model_path = str(path)
        if monitor is not None and self._is_best(metrics[monitor]):
            self._best, self.best_model_path = metrics[monitor], str(path)

    def _is_best(self, value: float) -> bool:
        return self._best is None or (value > self._best if self.mode == "max" else value < self._best)

    def _monitor_in(self, metrics: Mapping[str, float], trainer: pl.Trainer) -> str | None:
        if self.monitor is None or self.monitor in metrics:
            return self.monitor
        if trainer.fit_loop.epoch_loop.val_loop._has_run:
            names = ", ".join(metrics) or "there are none"
            self._warn_once(f"monitor={self.monitor!r} is not among the logged metrics ({names}): none is the best")
        return None

    def _leave_out_objects(self, state: dict[str, Any]) -> None:
        """Leave out hyper-parameters that are no plain values; only `load_from_checkpoint` would use them."""
        values: dict[str, Any] = state.get("hyper_parameters", {})
        for name, value in list(values.items()):
            try:
                to_plain(value)
            except CheckpointError:
                del values[name]
                self._warn_once(
                    f"the hyper-parameter {name!r}, a {type(value).__name__}, is left out of checkpoints; "
                    "they take tensors, numbers, text, lists and dicts"
                )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)


def _require_whole_weights(trainer: pl.Trainer) -> None:
    name = type(trainer.strategy).__name__
    if any(part in name for part in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise ConfigError(
            f"LightningCheckpoint saves whole weights, which {name} divides; use a DDP strategy, or ModelCheckpoint",
            code="weights-divided",
        )


def _require_bare_names(module: pl.LightningModule) -> None:
    """Raise ConfigError if a checkpoint would store weights under other names than Lightning looks for."""
    changed = next((key for key in module.state_dict() if bare_key(key) != key), None)
    if changed is not None:
        raise ConfigError(
            f"checkpoints store {changed!r} as {bare_key(changed)!r}, as if DDP or torch.compile had wrapped it, and "
            "Lightning would not find it; rename that attribute, or compile in configure_model",
            code="module-name-taken",
        )


def _require_one_run(run_id: str | None, trainer: pl.Trainer) -> None:
    """Raise ConfigError in all processes if they have different runs: they would load different checkpoints."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return
    runs: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(runs, run_id)
    if len(set(runs)) > 1:
        names = ", ".join(str(run) for run in runs)
        raise ConfigError(
            f"the processes of this training have different runs: {names}; give LightningCheckpoint the same run_id= "
            "in each",
            code="processes-with-own-runs",
        )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if torch.as_tensor(value).numel() == 1}


def _loaders_keep_state(trainer: pl.Trainer) -> bool:
    """Whether the data loaders have a state that Lightning itself restores, as torchdata's StatefulDataLoader."""
    loaders = trainer.fit_loop._combined_loader.flattened
    return all(hasattr(loader, "load_state_dict") for loader in loaders)


def _skip_batches(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    """Begin the epoch's batches anew as they began the first time, and take those that were trained on."""
    fetcher = trainer.fit_loop._data_fetcher
    random_state.restore(state["epoch_start"])
    for loader in trainer.fit_loop._combined_loader.flattened:
        for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(trainer.current_epoch)
    iter(fetcher)
    for _ in range(state["trained_batches"]):
        next(fetcher)
    fetcher.fetched = 0  # Lightning adds the batches that were trained on
