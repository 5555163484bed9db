"""`Trainer`, the training loop for scripts of your own, and `Callback`, which hears what it does."""

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.config import TrainConfig
from shufflenet_mlflow.data.own import LabelledImages
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.progress import Reporter, reporter_of
from shufflenet_mlflow.runtime.signals import CallersStopFlag
from shufflenet_mlflow.training.keeping import CheckpointStore, MetricSink, NoMetrics
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.training.own import put_together
from shufflenet_mlflow.training.result import TrainResult

EVENTS = ("start", "step", "validation", "checkpoint", "end")


class Callback:
    """Hears what a training does: override the methods that you need.

    They are called in the order of the list, between two iterations, in every process of a distributed job;
    `trainer.is_leader` tells which one writes. What they raise ends the training with that very error: the run is
    FAILED, and a checkpoint of the last iteration is kept.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first iteration, or the first one after resuming."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each iteration, before validation and checkpoint."""

    def on_validation(self, trainer: "Trainer", metrics: Mapping[str, float]) -> None:
        """After each validation.

        Args:
            metrics: `val/loss`; accuracies `val/top1`, `val/top5`, `val/mean_class_accuracy` and the share of the
                largest class `val/majority`, in 0..1.
        """

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        """After each checkpoint, once it is on the disk; only in the process that writes.

        Training waits until it is there, which it does not without this method.
        """

    def on_end(self, trainer: "Trainer", result: TrainResult) -> None:
        """After the last validation and checkpoint, also of a training that was stopped; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next checkpoint keeps: numbers, text, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called before `on_start` when a training is resumed."""


class Trainer(TrainingLoop):
    """The training loop of `train`, for a network, data, loss and optimizer of your own, in one process.

    The order of samples and all random draws follow from the seed, so that a resumed training ends with the bits of an
    uninterrupted one, whatever `config.workers`. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save a checkpoint first.

    Args:
        model: maps float (N, C, H, W) to logits (N, num_classes). It is moved to `config.device`, and trained.
        train_set: a map-style `torch.utils.data.Dataset`, or anything with `len` and indices, of pairs: an image,
            float (C, H, W), as the network takes it, and its label from 0 on.
        val_set: images of the same form; validated on every `config.val_interval` iterations and at the end.
        config: length, batches, rates, intervals; without what only `train` has, such as folders and augmentation.
        loss: maps logits (N, num_classes) and labels (N,), or with mixup and CutMix shares of classes
            (N, num_classes), to a number; by default cross-entropy with `config.label_smooth`.
        optimizer: of the network's parameters, with rates that `config.schedule` scales; by default as `config` says.
        store: a folder for checkpoints, or a `CheckpointStore`; by default none are kept.
        sink: a `MetricSink`, whose `log(values, iters)` gets all metrics; by default they are only shown.
        callbacks: instances of `Callback`.
        classes: names of the labels; by default `train_set.classes`, or the numbers.
        resume: go on from the newest checkpoint in `store`, if there is one.
        progress: print progress on stderr; with False, report to the log `shufflenet_mlflow`.

    Raises:
        ConfigError: an option cannot work, or has no effect here.
        DataError: a data set is empty, or has no indices.
        ResumeError: the checkpoint in `store` is of other options or data.
        CheckpointError: it is not of a training.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: LabelledImages,
        val_set: LabelledImages,
        config: TrainConfig | None = None,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        store: CheckpointStore | str | Path | None = None,
        sink: MetricSink | None = None,
        callbacks: Sequence[Callback] = (),
        classes: Sequence[str] | None = None,
        resume: bool = True,
        progress: bool | Reporter = True,
    ) -> None:
        config = config if config is not None else TrainConfig()
        parts = put_together(
            model, train_set, val_set, config, optimizer=optimizer, classes=classes, store=store, resume=resume
        )
        self._stop = CallersStopFlag()
        self.callbacks = check_callbacks(callbacks)
        super().__init__(
            config=parts.config,
            data=parts.data,
            state=parts.state,
            constants=parts.constants,
            store=parts.store,
            sink=sink if sink is not None else NoMetrics(),
            context=JobContext.alone(reporter_of(progress), self._stop),
            loss=loss,
        )
        self._point, self._is_complete = parts.resumed_from, parts.is_complete
        self.load_callbacks(parts.payload)

    @classmethod
    def of_parts(cls, *, callbacks: Sequence[Callback] = (), **parts: Any) -> "Trainer":
        """Return the loop of parts that were put together elsewhere, which handles no signals itself.

        Args:
            parts: those of `TrainingLoop`.
        """
        trainer = cls.__new__(cls)
        trainer.callbacks = check_callbacks(callbacks)
        trainer._stop, trainer._point, trainer._is_complete = None, None, False
        TrainingLoop.__init__(trainer, **parts)
        return trainer

    _stop: CallersStopFlag | None
    callbacks: list[Callback]

    # What callbacks read and do.

    @property
    def iters(self) -> int:
        """Completed iterations."""
        return self.state.iters

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.data.order.epoch_of(self.state.iters)

    @property
    def model(self) -> nn.Module:
        """The network that is trained; `state.evaluated_model` is its moving average, if there is one."""
        return self.state.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self.state.optimizer

    @property
    def train_loss(self) -> float:
        """Mean training loss since it was last reported; waits for the device."""
        return self.state.current_loss()

    @property
    def validation(self) -> Mapping[str, float]:
        """Metrics of the last validation; empty before the first."""
        return self.state.validation

    @property
    def best(self) -> Mapping[str, float] | None:
        """`val_top1` and `iters` of the best validation so far."""
        return self.state.best

    @property
    def is_leader(self) -> bool:
        """Whether this process writes and tracks; True if it trains alone."""
        return self.world.is_leader

    def log(self, values: Mapping[str, float]) -> None:
        """Keep metrics at the current iteration, beside those of the training."""
        self.sink.log({str(name): float(value) for name, value in values.items()}, self.iters)

    def stop(self, reason: str = "", *, finish: bool = True) -> None:
        """End the training after this iteration; in a distributed job, one process is enough.

        Args:
            reason: is shown, and stands in the run's description.
            finish: end as after the last iteration, with a last validation and final checkpoint; the run is complete.
                Otherwise end as after a signal, with a checkpoint from which it can be resumed.
        """
        if finish:
            self.stop_reason = reason or "no reason was given"
        else:
            self.context.stop.set(signal.SIGTERM)

    def pause(self, reason: str) -> None:
        """Stop after this iteration, with a checkpoint from which the training goes on another time; in one process.

        Args:
            reason: stands in the run's description.
        """
        self.pause_reason = reason

    def run(self, resumed_from: Path | None = None) -> TrainResult:
        """Train to the end, and return how it ended; call it once.

        A training that `store` holds complete is not trained again.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved; again Ctrl-C raises it at once. After another
                signal SystemExit.
            NonFiniteLossError: training diverged; the last good checkpoint is kept.
            DataError: an item of a data set is no image, or a process that reads them died.
            ConfigError: the network cannot be compiled, or memory ran out.
            CheckpointError: a checkpoint could not be written.
        """
        if self._stop is None:
            return super().run(resumed_from)
        if self._is_complete:
            self.reporter.note(f"nothing is left to train: {str(self._point)!r} is complete")
            self._resumed_from = self._point
            return self._result()
        with self._stop:
            result = super().run(self._point)
        self._stop.raise_received(f"stopped at iteration {result.iters}, which is saved in {str(result.checkpoint)!r}")
        return result

    # The events of the loop.

    def tell(self, event: str, *arguments: Any) -> None:
        """Tell all callbacks of an event."""
        if not self.callbacks:
            return
        if event == "checkpoint" and not (self._is_awaited() and self.store.newest() == arguments[0]):
            return
        for callback in self.callbacks:
            hear = getattr(callback, f"on_{event}", None)
            if hear is not None:
                hear(self, *arguments)
        is_common = self.world.size > 1 and event in ("start", "step", "validation")
        if is_common and self.world.highest(int(bool(self.stop_reason))):
            self.stop_reason = next(filter(None, self.world.gather(self.stop_reason)))

    def _is_awaited(self) -> bool:
        """Whether a callback waits for checkpoints."""
        heard = (getattr(type(callback), "on_checkpoint", None) for callback in self.callbacks)
        return any(method is not Callback.on_checkpoint for method in heard)

    def extra_state(self) -> dict[str, Any]:
        """Return the callbacks' entry of the next checkpoint, and why training ends, if it does."""
        states: list[dict[str, Any]] = []
        for callback in self.callbacks:
            state = callback.state_dict() if hasattr(callback, "state_dict") else None
            if state:
                states.append({"name": type(callback).__name__, "state": state})
        return {**super().extra_state(), **({"callbacks": states} if states else {})}

    def load_callbacks(self, payload: Mapping[str, Any]) -> None:
        """Restore the states of the callbacks from a checkpoint: of each class, in the order of the list."""
        saved = [entry for entry in payload.get("callbacks", ()) if isinstance(entry, dict)]
        for callback in self.callbacks:
            name = type(callback).__name__
            found = next((entry for entry in saved if entry.get("name") == name), None)
            if found is not None:
                saved.remove(found)
                callback.load_state_dict(found["state"])
        for entry in saved:
            self.reporter.warn(f"the checkpoint holds the state of a callback {entry.get('name')}, and there is none")


def check_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks as a list.

    Raises:
        ConfigError: it is not a list, or one of them hears of nothing.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks (={callbacks!r}) must be a list of them", code="callbacks-not-list")
    for callback in callbacks:
        if isinstance(callback, type):
            raise ConfigError(
                f"callbacks: {callback.__name__} is a class; give an instance, {callback.__name__}()",
                code="callback-is-class",
            )
        if not any(callable(getattr(callback, f"on_{event}", None)) for event in EVENTS):
            raise ConfigError(
                f"callbacks: {callback!r} has none of the methods {', '.join(f'on_{event}' for event in EVENTS)}",
                code="callback-hears-nothing",
            )
    return list(callbacks)
