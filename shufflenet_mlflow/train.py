"""The training loop, one for all networks.

It sees where checkpoints and metrics go only as the two small protocols below.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from shufflenet_mlflow.checkpoint import FINAL_TAG
from shufflenet_mlflow.config import TrainConfig
from shufflenet_mlflow.data.folder import ImageListing
from shufflenet_mlflow.data.loader import (
    BadImageLog,
    ImageDataset,
    batches_of,
    make_loader,
    worker_death,
)
from shufflenet_mlflow.data.preprocess import AUGMENTATIONS, MODES, Preprocess, ToInput, draw_lighting
from shufflenet_mlflow.data.sampler import ReestimationBatches, SampleOrder, TrainBatches
from shufflenet_mlflow.errors import DataError, NonFiniteLossError
from shufflenet_mlflow.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.recipe import (
    REESTIMATION_IMAGES,
    count_correct,
    make_loss,
    reestimate_bn,
    training_loss,
)
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.state import TrainingState
from shufflenet_mlflow.stopping import StopFlag, StopRequested


class CheckpointStore(Protocol):
    """Where checkpoints go."""

    def save(
        self,
        state: Mapping[str, Any],
        iters: int,
        tag: str,
        *,
        val_top1: float | None,
    ) -> Path:
        """Keep a copy of `state`, which may be written later; the file that it will be.

        Raises:
            CheckpointError: an earlier one could not be kept.
        """

    def mark_best(self, checkpoint: Path, val_top1: float) -> bool:
        """A checkpoint that is kept already has turned out to be the best.

        Its file is not written again: it may be what the run's latest checkpoint is committed to be. False if
        that cannot be done, because it was not this store that kept it.
        """

    def newest(self) -> Path | None:
        """Wait until everything is on the disk, or has failed; the newest checkpoint that is there."""

    def finish(self) -> Path | None:
        """Wait until everything is on the disk; the newest checkpoint that is, None if there is none.

        Raises:
            CheckpointError: something could not be kept.
        """


class MetricSink(Protocol):
    """Where metric points go."""

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """Keep points at step `iters`."""


@dataclass(frozen=True)
class TrainData:
    """The two sets of images and the order of the first."""

    train: ImageListing
    val: ImageListing
    order: SampleOrder
    preprocess: Preprocess


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended."""

    iters: int
    epoch: int
    loss: float
    val_top1: float | None
    """Of the last validation; None if there was none."""
    val_top5: float | None
    checkpoint: Path | None
    """The last checkpoint; None if it was stopped before the first iteration."""
    stopped_by: int | None = None
    """The signal that ended the run early."""


@dataclass
class Trainer:
    """What the loop works with.

    Args:
        constants: what every checkpoint holds besides the training state: network, preprocessing, classes,
            configuration.
    """

    config: TrainConfig
    data: TrainData
    state: TrainingState
    constants: Mapping[str, Any]
    store: CheckpointStore
    sink: MetricSink
    reporter: Reporter
    stop: StopFlag

    def __post_init__(self) -> None:
        self.bad_images = BadImageLog(skip=self.config.on_bad_image == "skip")
        self._to_input = ToInput(self.data.preprocess, self.state.device)
        self.saved: Path | None = None
        self._resumed_from: Path | None = None
        self._saved_iters: int | None = None
        self._mid_step = False

    def run(self, resumed_from: Path | None = None) -> TrainResult:
        """Train from `state.iters` to `config.total_iters`, then re-estimate the BN statistics and validate.

        A signal ends it early, with a checkpoint of the last complete iteration.

        Args:
            resumed_from: the run's own checkpoint that `state` was loaded from.

        Raises:
            NonFiniteLossError: training diverged; the last good checkpoint is kept.
            DataError: an image cannot be read, or a process that reads them died; a checkpoint of the last
                complete iteration is kept.
        """
        self._resumed_from = resumed_from
        if resumed_from is not None:
            self.saved, self._saved_iters = resumed_from, self.state.iters
        try:
            self.stop.check()
            if self._validation_is_due() and self.state.validated_iters < self.state.iters:
                self._validate_and_keep_best()  # a signal had cut it short
            self._train()
            self._finish()
        except StopRequested as stop:
            self._save_once()
            return self._result(stopped_by=stop.signum)
        except DataError:
            self._save_once()
            raise
        except RuntimeError as error:
            death = worker_death(error)
            if death is None:
                raise
            if not self._mid_step:
                self._save_once()
            raise death from error
        except NonFiniteLossError as error:
            saved = self.store.newest() or self._resumed_from
            kept = f"the last good checkpoint is {str(saved)!r}" if saved else "no checkpoint yet"
            raise NonFiniteLossError(f"{error}; {kept}") from error
        return self._result()

    def _train(self) -> None:
        config, state = self.config, self.state
        loss_function = make_loss(config.label_smooth)
        loader = make_loader(
            self._training_images(),
            TrainBatches(self.data.order, state.iters, config.total_iters),
            workers=config.workers,
            pin_memory=state.device.type == "cuda",
        )
        state.model.train()
        clock = _Clock(state.iters)
        with self.reporter.phase("training", config.total_iters, state.iters) as phase:
            for batch in batches_of(loader):
                for bad in self.bad_images.new_in(batch):
                    self.reporter.warn(f"another image stands in for it: {bad}")
                if not len(batch.labels_N):
                    raise DataError(f"no file in {str(self.data.train.root)!r} is a readable image")
                lr = state.lr
                labels = batch.labels_N.to(state.device, non_blocking=True)
                outputs = state.model(self._to_input(batch.images_NCHW, batch.shift_NC))
                loss, logits = training_loss(outputs, labels, loss_function)
                self._mid_step = True
                state.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                state.optimizer.step()
                state.scheduler.step()
                state.iters += 1
                state.meter.update(state.iters, loss, *count_correct(logits.detach(), labels), len(labels))
                self._mid_step = False
                phase.advance()
                if state.device.type == "cpu":  # elsewhere looking would make the device wait
                    state.check_finite()
                if state.iters % config.display_interval == 0:
                    self._report_training(lr, clock)
                if self._validation_is_due():
                    with clock.paused():
                        self._validate_and_keep_best()
                if state.iters % config.save_interval == 0:
                    with clock.paused():
                        self._save_once()
                self.stop.check()

    def _training_images(self) -> ImageDataset:
        augmentation = AUGMENTATIONS[self.config.augment]
        mode = MODES[self.data.preprocess.mode]
        return ImageDataset(
            self.data.train,
            augmentation.transform(self.data.preprocess),
            lighting=partial(draw_lighting, mode) if augmentation.lighting else None,
            seed=self.config.seed,
            replace_bad=True,
        )

    def _finish(self) -> None:
        """BN statistics that fit the final weights, and the accuracy of that state."""
        self._save_once()
        state = self.state
        with self.reporter.phase("re-estimating BN", self._reestimation_batches()) as phase:
            reestimate_bn(state.model, self._reestimation_inputs(phase.advance))
        self._validate()
        self._save(FINAL_TAG)
        if state.best is not None:
            self.sink.log({"best/val_top1": state.best["val_top1"]}, 0)

    def _reestimation_batches(self) -> int:
        most = -(-REESTIMATION_IMAGES // self.config.batch_size)
        return min(most, self.data.order.iters_per_epoch)

    def _reestimation_inputs(self, advance: Any) -> Iterator[Tensor]:
        loader = make_loader(
            self._training_images(),
            ReestimationBatches(self.data.order, self._reestimation_batches()),
            workers=self.config.workers,
            pin_memory=self.state.device.type == "cuda",
        )
        for batch in batches_of(loader):
            self.stop.check()
            self.bad_images.new_in(batch)
            yield self._to_input(batch.images_NCHW, batch.shift_NC)
            advance()

    def _report_training(self, lr: float, clock: "_Clock") -> None:
        state = self.state
        state.check_finite()
        means = state.meter.means()
        state.loss = means["train/loss"]
        values = {
            **means,
            "train/lr": lr,
            "train/images_per_second": clock.lap(state.iters) * self.config.batch_size,
        }
        state.meter.reset()
        self.sink.log(values, state.iters)
        self.reporter.metrics(state.iters, values)

    def _validation_is_due(self) -> bool:
        """The last iteration's validation comes after the BN re-estimation."""
        iters = self.state.iters
        return 0 < iters < self.config.total_iters and iters % self.config.val_interval == 0

    def _validate_and_keep_best(self) -> None:
        if not self._validate():
            return
        kept = self.saved if self._saved_iters == self.state.iters else None
        if kept is None or not self.store.mark_best(kept, self.state.validation["val/top1"]):
            self._save("")

    def _validate(self) -> bool:
        """True if it was the best validation so far."""
        self.state.check_finite()
        result = evaluate(
            self.state.model,
            self.data.val,
            self.data.preprocess,
            EvalSettings(self.config.batch_size, self.config.workers, self.state.device),
            bad_images=self.bad_images,
            reporter=self.reporter,
            stop=self.stop,
        )
        values = _validation_metrics(result)
        self.sink.log(values, self.state.iters)
        self.reporter.metrics(self.state.iters, values)
        return self.state.record_validation(values)

    def _save_once(self) -> None:
        """Save, unless this iteration has been saved already or nothing has been trained."""
        if self.state.iters and self._saved_iters != self.state.iters:
            self._save("")

    def _save(self, tag: str) -> None:
        state = self.state
        state.check_finite()  # a poisoned state must never become the newest checkpoint
        epoch = self.data.order.epoch_of(state.iters)
        validated = state.validated_iters == state.iters
        self.saved = self.store.save(
            {
                **self.constants,
                **state.state_dict(),
                "iters": state.iters,
                "epoch": epoch,
                "sampler_state": self.data.order.state_dict(state.iters),
            },
            state.iters,
            tag,
            val_top1=state.validation["val/top1"] if validated else None,
        )
        self._saved_iters = state.iters

    def _on_disk(self) -> Path | None:
        """The newest checkpoint, once it is on the disk."""
        return self.store.finish() or self._resumed_from

    def _result(self, stopped_by: int | None = None) -> TrainResult:
        state = self.state
        return TrainResult(
            iters=state.iters,
            epoch=self.data.order.epoch_of(state.iters),
            loss=state.current_loss(),
            val_top1=state.validation.get("val/top1"),
            val_top5=state.validation.get("val/top5"),
            checkpoint=self._on_disk(),
            stopped_by=stopped_by,
        )


def _validation_metrics(result: EvalResult) -> dict[str, float]:
    return {"val/loss": result.loss, "val/top1": result.top1, "val/top5": result.top5}


class _Clock:
    """Iterations per second, not counting the time in `paused`."""

    def __init__(self, iters: int) -> None:
        self._start, self._iters = time.perf_counter(), iters

    def lap(self, iters: int) -> float:
        now = time.perf_counter()
        rate = (iters - self._iters) / max(now - self._start, 1e-9)
        self._start, self._iters = now, iters
        return rate

    def paused(self) -> "_Pause":
        return _Pause(self)

    def shift(self, seconds: float) -> None:
        self._start += seconds


class _Pause:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_exception: object) -> None:
        self._clock.shift(time.perf_counter() - self._began)
