"""The training loop, one for all networks.

It sees where checkpoints and metrics go only as the two small protocols below.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shufflenet_mlflow.checkpoints.names import FINAL_TAG
from shufflenet_mlflow.config import AMP_DTYPES, TrainConfig
from shufflenet_mlflow.data.augment import AUGMENTATIONS, draw_lighting
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import (
    BadImageLog,
    Batch,
    ImageDataset,
    batches_of,
    make_loader,
    worker_death,
)
from shufflenet_mlflow.data.preprocess import MODES, Preprocess, ToInput
from shufflenet_mlflow.data.sampler import (
    REESTIMATION_EPOCH,
    MicroBatches,
    ReestimationBatches,
    SampleOrder,
    TrainBatches,
    derive_seed,
)
from shufflenet_mlflow.errors import DataError, NonFiniteLossError, PeerFailedError
from shufflenet_mlflow.evaluation.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.evaluation.metrics import count_correct
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import compile_failure, compiled, lack_of_memory
from shufflenet_mlflow.runtime.distributed import loss_of_process
from shufflenet_mlflow.runtime.signals import StopRequested
from shufflenet_mlflow.training.batchnorm import RunningStatistics, reestimate_bn
from shufflenet_mlflow.training.recipe import REESTIMATION_IMAGES, make_loss, training_loss
from shufflenet_mlflow.training.state import TrainingState


class CheckpointStore(Protocol):
    """Keeps checkpoints."""

    def save(
        self,
        state: Mapping[str, Any],
        iters: int,
        tag: str,
        *,
        val_top1: float | None,
    ) -> Path:
        """Keep a copy of `state`, which may be written later, and return the file's path.

        Raises:
            CheckpointError: an earlier one could not be kept.
        """

    def mark_best(self, checkpoint: Path, val_top1: float) -> bool:
        """Mark a checkpoint that is kept already as the best; return whether that was possible.

        Its file is not written again, since the run's `checkpoint.latest` may name it. A checkpoint that another store
        kept cannot be marked.
        """

    def newest(self) -> Path | None:
        """Wait until everything is on the disk, or has failed; return the newest checkpoint that is there."""

    def finish(self) -> Path | None:
        """Wait until everything is on the disk; return the newest checkpoint, or None if there is none.

        Raises:
            CheckpointError: something could not be kept.
        """


class MetricSink(Protocol):
    """Keeps metric points."""

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """Keep points at step `iters`."""


@dataclass(frozen=True)
class TrainData:
    """Training and validation images, the order of samples, and how batches are divided."""

    train: ImageListing
    val: ImageListing
    order: SampleOrder
    micro_batches: MicroBatches
    preprocess: Preprocess


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended."""

    iters: int
    epoch: int
    loss: float
    val_top1: float | None
    """Accuracy of the last validation; None if there was none."""
    val_top5: float | None
    checkpoint: Path | None
    """The last checkpoint; None if it was stopped before the first iteration."""
    stopped_by: int | None = None
    """The signal that ended the run early."""


@dataclass
class Trainer:
    """The training loop of one process.

    Args:
        constants: entries of every checkpoint besides the training state: network, preprocessing, classes,
            configuration.
    """

    config: TrainConfig
    data: TrainData
    state: TrainingState
    constants: Mapping[str, Any]
    store: CheckpointStore
    sink: MetricSink
    context: JobContext

    def __post_init__(self) -> None:
        self.world, self.reporter = self.context.world, self.context.reporter
        self.bad_images = BadImageLog(skip=self.config.on_bad_image == "skip")
        self._to_input = ToInput(self.data.preprocess, self.state.device)
        self._loss_function = make_loss(self.config.label_smooth)
        self._statistics = RunningStatistics(self.state.model, self.world, self.data.micro_batches.accumulation_steps)
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
            ConfigError: the network cannot be compiled, or memory ran out.
            LostProcessError: another process of this job is gone.
            DataError: an image cannot be read, or a process that reads them died; a checkpoint of the last
                complete iteration is kept.
        """
        self._resumed_from = resumed_from
        if resumed_from is not None:
            self.saved, self._saved_iters = resumed_from, self.state.iters
        try:
            self.world.raise_if_any_failed()
            if self._validation_is_due() and self.state.validated_iters < self.state.iters:
                self._validate_and_keep_best()  # a signal had cut it short
            self._train()
            self._finish()
        except StopRequested as stop:
            self._save_once()
            return self._result(stopped_by=stop.signum)
        except (DataError, PeerFailedError):
            if self.world.size == 1 or not self._mid_step:  # the others are elsewhere in the middle of a step
                self._save_once()
            raise
        except RuntimeError as error:
            problem = worker_death(error) or loss_of_process(error) or compile_failure(error) or lack_of_memory(error)
            if problem is None:
                raise
            if self.world.size == 1 and not self._mid_step:
                self._save_once()
            raise problem from error
        except NonFiniteLossError as error:
            if not self.world.is_leader:
                raise PeerFailedError(str(error), code="peer-diverged") from error
            saved = self.store.newest() or self._resumed_from
            kept = f"the last good checkpoint is {str(saved)!r}" if saved else "no checkpoint yet"
            raise NonFiniteLossError(f"{error}; {kept}", code="diverged") from error
        return self._result()

    def all_bad_images(self) -> set[str]:
        """Return the unreadable files that any process has met; all processes have to take part."""
        return {path for paths in self.world.gather(list(self.bad_images.seen)) for path in paths}

    def _train(self) -> None:
        config, state = self.config, self.state
        fetched = self.batches(state.iters, config.total_iters)
        state.model.train()
        size = self.data.preprocess.input_size
        network = self.world.wrap(state.model, state.device, torch.zeros(2, 3, size, size, device=state.device))
        if config.compile:
            network = compiled(network)
        clock = _Clock(state.iters)
        with self.reporter.phase("training", config.total_iters, state.iters) as phase:
            rounds = config.total_iters - state.iters
            for parts in self.world.synced_batches(rounds, lambda: self.fetch(fetched)):
                lr = state.lr
                self.step(network, parts)
                phase.advance()
                if state.device.type == "cpu" and self.world.size == 1:  # elsewhere looking would mean waiting
                    state.check_finite()
                if state.iters % config.display_interval == 0:
                    self._report_training(lr, clock)
                if self._validation_is_due():
                    with clock.paused():
                        self._validate_and_keep_best()
                if state.iters % config.save_interval == 0:
                    with clock.paused():
                        self._save_once()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield this process's micro-batches of the iterations from `start` up to, not including, `stop`."""
        order, micro_batches = self.data.order, self.data.micro_batches
        return self._loaded(TrainBatches(order, start, stop, micro_batches))

    def _loaded(self, batches: TrainBatches | ReestimationBatches) -> Iterator[Batch]:
        loader = make_loader(
            self._training_images(),
            batches,
            workers=self.config.workers,
            pin_memory=self.state.device.type == "cuda",
        )
        return batches_of(loader)

    def fetch(self, fetched: Iterator[Batch]) -> list[Batch]:
        """Return this process's micro-batches of the next iteration, taken from what `batches` yields."""
        parts = [next(fetched) for _ in self.data.micro_batches.local_indices]
        for part in parts:
            for bad in self.bad_images.new_in(part):
                self.reporter.warn(f"replaced by another image: {bad}")
            if not len(part.labels_N):
                raise DataError(
                    f"no file in {str(self.data.train.root)!r} is a readable image", code="train-no-readable-image"
                )
        return parts

    def step(self, network: nn.Module, parts: Sequence[Batch]) -> None:
        """Do one iteration: gradients of all micro-batches in all processes, then one optimizer step."""
        state, micro_batches = self.state, self.data.micro_batches
        self._mid_step = True
        state.randomness.begin_iteration()
        state.optimizer.zero_grad(set_to_none=True)
        for number, batch in zip(micro_batches.local_indices, parts, strict=True):
            size = len(batch.labels_N)
            labels = batch.labels_N.to(state.device, non_blocking=True)
            images = self.to_input(batch)
            state.randomness.begin_micro_batch(number)
            with _gradients_kept_here(network) if number != micro_batches.local_indices[-1] else nullcontext():
                with self._autocast():
                    with self._statistics.micro_batch():
                        outputs = network(images)
                    loss, logits = training_loss(outputs, labels, self._loss_function)
                # The mean over the batch, as the processes' gradients are averaged.
                share = size * self.world.size / micro_batches.batch_size
                state.backward(loss if share == 1 else loss * share)
            state.meter.update(state.iters + 1, loss, *count_correct(logits.detach(), labels), size)
        self._statistics.combine()
        state.step()
        self._mid_step = False

    def to_input(self, batch: Batch) -> Tensor:
        """Return the images of a batch, float (N, 3, H, W) on the device."""
        return self._to_input(batch.images_NCHW, batch.shift_NC)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of `--amp` within the block."""
        name = AMP_DTYPES[self.config.amp]
        return nullcontext() if name is None else torch.autocast(self.state.device.type, getattr(torch, name))

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
        """Re-estimate the BN statistics for the final weights, validate, and save the final checkpoint."""
        self._save_once()
        state = self.state
        with self.reporter.phase("re-estimating BN", self._reestimation_batches()) as phase:
            networks = [state.model] if state.ema is None else [state.model, state.ema.module]
            reestimate_bn(networks, self._reestimation_inputs(phase.advance), self.world)
        self._validate()
        self._save(FINAL_TAG)
        if state.best is not None:
            self.sink.log(best_metrics(state.best), 0)

    def _reestimation_batches(self) -> int:
        most = -(-REESTIMATION_IMAGES // self.config.batch_size)
        return min(most, self.data.order.iters_per_epoch)

    def _reestimation_inputs(self, advance: Callable[[], None]) -> Iterator[Tensor]:
        batches, micro_batches = self._reestimation_batches(), self.data.micro_batches
        fetched = self._loaded(ReestimationBatches(self.data.order, batches, micro_batches))
        for position, parts in enumerate(self.world.synced_batches(batches, lambda: self.fetch(fetched))):
            for number, batch in zip(micro_batches.local_indices, parts, strict=True):
                torch.manual_seed(derive_seed(self.config.seed, REESTIMATION_EPOCH, position, number))
                yield self.to_input(batch)
            advance()

    def _report_training(self, lr: float, clock: "_Clock") -> None:
        state = self.state
        state.meter.collect()
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
        """Whether to validate now; after the last iteration that follows the BN re-estimation."""
        iters = self.state.iters
        return 0 < iters < self.config.total_iters and iters % self.config.val_interval == 0

    def _validate_and_keep_best(self) -> None:
        if not self._validate():
            return
        kept = self.saved if self._saved_iters == self.state.iters else None
        marked = kept is not None and self.store.mark_best(kept, self.state.validation["val/top1"])
        if not self.world.from_leader(marked):  # the others keep nothing and cannot know
            self._save("")

    def _validate(self) -> bool:
        """Validate; return whether it was the best validation so far."""
        config = self.config
        self.state.meter.collect()
        self.state.check_finite()
        result = evaluate(
            self.state.evaluated_model,
            self.data.val,
            self.data.preprocess,
            EvalSettings(config.micro_batch_size or config.batch_size, config.workers, self.state.device),
            bad_images=self.bad_images,
            context=self.context,
        )
        values = _validation_metrics(result)
        self.sink.log(values, self.state.iters)
        self.reporter.metrics(self.state.iters, values)
        return self.state.record_validation(values)

    def _save_once(self) -> None:
        """Save, unless this iteration has been saved already or nothing was trained."""
        if self.state.iters and self._saved_iters != self.state.iters:
            self._save("")

    def _save(self, tag: str) -> None:
        state = self.state
        state.meter.collect()
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

    def _result(self, stopped_by: int | None = None) -> TrainResult:
        state = self.state
        state.meter.collect()
        return TrainResult(
            iters=state.iters,
            epoch=self.data.order.epoch_of(state.iters),
            loss=state.current_loss(),
            val_top1=state.validation.get("val/top1"),
            val_top5=state.validation.get("val/top5"),
            checkpoint=self.store.finish() or self._resumed_from,
            stopped_by=stopped_by,
        )


def best_metrics(best: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that a run ends with, from its best validation."""
    return {"best/val_top1": best["val_top1"], "best/iters": best["iters"]}


def _validation_metrics(result: EvalResult) -> dict[str, float]:
    return {"val/loss": result.loss, "val/top1": result.top1, "val/top5": result.top5}


def _gradients_kept_here(network: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients in this process only, until a backward pass outside the block."""
    inner = getattr(network, "_orig_mod", network)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()


class _Clock:
    """Measures iterations per second, without the time in `paused`."""

    def __init__(self, iters: int) -> None:
        self._start, self._iters = time.perf_counter(), iters

    def lap(self, iters: int) -> float:
        now = time.perf_counter()
        rate = (iters - self._iters) / max(now - self._start, 1e-9)
        self._start, self._iters = now, iters
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began
