"""The training loop, one for all networks.

It sees where checkpoints and metrics go only as the two small protocols in `keeping`, and tells of its events through
`tell`; `Trainer` passes them on to callbacks.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shufflenet_mlflow.checkpoints.names import FINAL_TAG
from shufflenet_mlflow.config import AMP_DTYPES, RunConfig
from shufflenet_mlflow.data.augment import AUGMENTATIONS, Erasing, draw_lighting
from shufflenet_mlflow.data.loader import (
    BadImageLog,
    Batch,
    ImageDataset,
    batches_of,
    make_loader,
)
from shufflenet_mlflow.data.own import items_of
from shufflenet_mlflow.data.preprocess import ToInput
from shufflenet_mlflow.data.sampler import (
    REESTIMATION_EPOCH,
    ReestimationBatches,
    TrainBatches,
    derive_seed,
)
from shufflenet_mlflow.errors import DataError, NonFiniteLossError, PeerFailedError, ShuffleNetError
from shufflenet_mlflow.evaluation.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.evaluation.metrics import count_correct
from shufflenet_mlflow.evaluation.top5 import shown_metrics
from shufflenet_mlflow.runtime.compiler import compile_failure, compiled
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import lack_of_memory
from shufflenet_mlflow.runtime.distributed import loss_of_process
from shufflenet_mlflow.runtime.signals import StopRequested
from shufflenet_mlflow.runtime.threads import threads_used
from shufflenet_mlflow.training.batchnorm import RunningStatistics, reestimate_bn
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.training.distillation import Teacher
from shufflenet_mlflow.training.keeping import CheckpointStore, MetricSink
from shufflenet_mlflow.training.loss import class_weights, make_loss, training_loss
from shufflenet_mlflow.training.meter import Clock
from shufflenet_mlflow.training.mixing import Mixing, main_labels
from shufflenet_mlflow.training.result import TrainResult, best_metrics
from shufflenet_mlflow.training.state import TrainingState

VALIDATION_BN_IMAGES = 25_600
"""The most training images whose BN statistics a part of a network is validated with: 200 batches of 128, as published
for the candidates of a search."""


@dataclass
class TrainingLoop:
    """The training loop of one process.

    Args:
        constants: entries of every checkpoint besides the training state: network, preprocessing, classes,
            configuration.
        teacher: the network to distil from, if any.
        loss: of logits (N, num_classes) and labels (N,) or shares of classes (N, num_classes); by default the
            cross-entropy that the configuration describes.
    """

    config: RunConfig
    data: TrainData
    state: TrainingState
    constants: Mapping[str, Any]
    store: CheckpointStore
    sink: MetricSink
    context: JobContext
    teacher: Teacher | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.world, self.reporter = self.context.world, self.context.reporter
        self.bad_images = BadImageLog(skip=self.config.on_bad_image == "skip")
        self._to_input = ToInput(self.data.preprocess, self.state.device)
        config, weights = self.config, None
        if config.balance == "weights":
            weights = class_weights(self.data.train.samples.labels, config.num_classes).to(self.state.device)
        self._loss_function = self.loss or make_loss(config.label_smooth, weights)
        self._mixing = Mixing(config.mixup, config.cutmix, config.num_classes, config.seed)
        self._statistics = RunningStatistics(self.state.model, self.world, self.data.micro_batches.accumulation_steps)
        self.saved: Path | None = None
        self._resumed_from: Path | None = None
        self._saved_iters: int | None = None
        self._mid_step = self._warned_of_only_answer = False
        self._failed_telling: BaseException | None = None
        self.stop_reason = ""
        """Why training ends before its last iteration, without having been interrupted."""
        self.pause_reason = ""
        """Why training stops after this iteration, with a checkpoint from which it goes on another time."""

    def tell(self, event: str, *arguments: Any) -> None:
        """Hear of an event: `start`, `step`, `validation` (metrics), `checkpoint` (path) or `end` (result)."""

    def _tell(self, event: str, *arguments: Any) -> None:
        try:
            self.tell(event, *arguments)
        except BaseException as error:
            self._failed_telling = error
            raise

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
        with threads_used(self.config.threads):
            return self._run(resumed_from)

    def _run(self, resumed_from: Path | None) -> TrainResult:
        self._resumed_from = resumed_from
        if resumed_from is not None:
            self.saved, self._saved_iters = resumed_from, self.state.iters
        try:
            self.world.raise_if_any_failed()
            self._tell("start")
            if self._validation_is_due() and self.state.validated_iters < self.state.iters:
                self._validate_and_keep_best()  # a signal had cut it short
            self._train()
            self._finish()
            result = self._result()
        except StopRequested as stop:
            self._save_once()
            result = self._result(stopped_by=stop.signum)
        except BaseException as error:
            if error is not self._failed_telling:
                self._explain(error)
            elif self.world.size == 1:  # the user's own error, between two iterations
                with suppress(ShuffleNetError):
                    self._save_once()
                self._note_what_is_kept()
            raise
        self._tell("end", result)
        return result

    def _explain(self, error: BaseException) -> None:
        """Keep what was trained where that is possible, and raise an error that says more, if there is one."""
        if isinstance(error, (DataError, PeerFailedError)):
            if self.world.size == 1 or not self._mid_step:  # the others are elsewhere in the middle of a step
                self._save_once()
            self._note_what_is_kept()
        elif isinstance(error, RuntimeError):
            problem = loss_of_process(error) or compile_failure(error) or lack_of_memory(error)
            if problem is None:
                return
            if self.world.size == 1 and not self._mid_step:
                self._save_once()
            raise problem from error
        elif isinstance(error, NonFiniteLossError):
            if not self.world.is_leader:
                raise PeerFailedError(str(error), code="peer-diverged") from error
            saved = self.store.newest() or self._resumed_from
            kept = f"the last good checkpoint is {str(saved)!r}" if saved else "no checkpoint yet"
            raise NonFiniteLossError(f"{error}; {kept}", code="diverged") from error

    def _note_what_is_kept(self) -> None:
        if self.saved is not None:
            self.reporter.note(f"what was trained until then is kept in {str(self.saved)!r}")

    def all_bad_images(self) -> set[str]:
        """Return the unreadable files that any process has met; all processes have to take part."""
        return {path for paths in self.world.gather(list(self.bad_images.seen)) for path in paths}

    def _train(self) -> None:
        config, state = self.config, self.state
        fetched = self.batches(state.iters, config.total_iters)
        state.model.train()
        size = self.data.preprocess.input_size
        images = torch.zeros(2, 3, size, size, device=state.device)
        network = self.world.wrap(state.model, state.device, images, uses_parts=state.trains_parts)
        if config.compile:
            network = compiled(network)
        clock = Clock(state.iters)
        if self._shall_end():
            return
        self._pause_if_asked()
        with self.reporter.phase("training", config.total_iters, state.iters) as phase:
            rounds = config.total_iters - state.iters
            for parts in self.world.synced_batches(rounds, lambda: self.fetch(fetched)):
                lr = state.lr
                self.step(network, parts)
                self._tell("step")
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
                if self._shall_end():
                    break
                self._pause_if_asked()

    def _pause_if_asked(self) -> None:
        """Stop as after a signal, which this process has not received."""
        if self.pause_reason:
            raise StopRequested(signal.SIGTERM)

    def _shall_end(self) -> bool:
        """Whether training ends here, and say why: a run that was stopped after that must not go on, either."""
        since_best = self.state.validations_since_best
        if 0 < self.config.patience <= since_best:
            self.reporter.note(f"--patience: the last {since_best} validations were no better")
            return True
        if self.stop_reason:
            self.reporter.note(f"ended by a callback: {self.stop_reason}")
        return bool(self.stop_reason)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield this process's micro-batches of the iterations from `start` up to, not including, `stop`."""
        order, micro_batches = self.data.order, self.data.micro_batches
        return self._loaded(TrainBatches(order, start, stop, micro_batches))

    def _loaded(self, batches: TrainBatches | ReestimationBatches) -> Iterator[Batch]:
        loader = make_loader(
            items_of(self.data.train, self._training_images, seed=self.config.seed),
            batches,
            workers=self.config.workers,
            pin_memory=self.state.device.type == "cuda",
        )
        return batches_of(loader, self.context.stop)

    def fetch(self, fetched: Iterator[Batch]) -> list[Batch]:
        """Return this process's micro-batches of the next iteration, taken from what `batches` yields."""
        parts = [next(fetched) for _ in self.data.micro_batches.local_indices]
        for part in parts:
            for bad in self.bad_images.new_in(part):
                self.reporter.warn(f"replaced by another image: {bad}")
            if not len(part.labels_N):
                raise DataError(
                    f"no file in {str(self.data.train.source)!r} is a readable image", code="train-no-readable-image"
                )
        return parts

    def step(self, network: nn.Module, parts: Sequence[Batch]) -> None:
        """Do one iteration: gradients of all micro-batches in all processes, then one optimizer step."""
        state, micro_batches = self.state, self.data.micro_batches
        self._mid_step = True
        state.begin_iteration()
        state.optimizer.zero_grad(set_to_none=True)
        for number, batch in zip(micro_batches.local_indices, parts, strict=True):
            size = len(batch.labels_N)
            labels = batch.labels_N.to(state.device, non_blocking=True)
            pixels = self._to_input.pixels(batch.images_NCHW, batch.shift_NC)
            pixels, targets = self._mixing(pixels, labels, state.iters, number)
            images = self._to_input.normalise(pixels)
            state.randomness.begin_micro_batch(number)
            with _gradients_kept_here(network) if number != micro_batches.local_indices[-1] else nullcontext():
                with self._autocast():
                    with self._statistics.micro_batch():
                        outputs = network(images)
                    loss, logits = training_loss(outputs, targets, self._loss_function)
                    if self.teacher is not None:
                        loss = self.teacher.blend(loss, logits, pixels)
                # The mean over the batch, as the processes' gradients are averaged.
                share = size * self.world.size / micro_batches.batch_size
                state.backward(loss if share == 1 else loss * share)
            state.meter.update(state.iters + 1, loss, *count_correct(logits.detach(), main_labels(targets)), size)
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
        mode = self.data.preprocess.settings
        transform = augmentation.transform(self.data.preprocess)
        if self.config.erasing:
            transform = Erasing(transform, self.data.preprocess, self.config.erasing)
        return ImageDataset(
            self.data.train,
            transform,
            lighting=partial(draw_lighting, mode) if augmentation.lighting else None,
            seed=self.config.seed,
            replace_bad=True,
        )

    def _finish(self) -> None:
        """Re-estimate the BN statistics for the final weights, validate, and save the final checkpoint."""
        self._save_once()
        state = self.state
        networks = [state.model] if state.ema is None else [state.model, state.ema.module]
        self._reestimate_bn(networks, self.config.bn_images)
        self._validate(state.evaluated_model)
        self._save(FINAL_TAG)
        if state.best is not None:
            self.sink.log(best_metrics(state.best), 0)

    def _reestimate_bn(self, networks: Sequence[nn.Module], images: int) -> None:
        batches = min(-(-images // self.config.batch_size), self.data.order.iters_per_epoch)
        with self.reporter.phase("re-estimating BN", batches) as phase:
            reestimate_bn(networks, self._reestimation_inputs(batches, phase.advance), self.world)

    def _reestimation_inputs(self, batches: int, advance: Callable[[], None]) -> Iterator[Tensor]:
        micro_batches = self.data.micro_batches
        fetched = self._loaded(ReestimationBatches(self.data.order, batches, micro_batches))
        for position, parts in enumerate(self.world.synced_batches(batches, lambda: self.fetch(fetched))):
            for number, batch in zip(micro_batches.local_indices, parts, strict=True):
                torch.manual_seed(derive_seed(self.config.seed, REESTIMATION_EPOCH, position, number))
                yield self.to_input(batch)
            advance()

    def _report_training(self, lr: float, clock: "Clock") -> None:
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
        self.reporter.metrics(state.iters, shown_metrics(values, self.config.num_classes))

    def _validation_is_due(self) -> bool:
        """Whether to validate now; after the last iteration that follows the BN re-estimation."""
        iters = self.state.iters
        return 0 < iters < self.config.total_iters and iters % self.config.val_interval == 0

    def _validate_and_keep_best(self) -> None:
        images = min(self.config.bn_images, VALIDATION_BN_IMAGES)
        if not self._validate(self.state.model_to_validate(lambda model: self._reestimate_bn([model], images))):
            return
        kept = self.saved if self._saved_iters == self.state.iters else None
        marked = kept is not None and self.store.mark_best(kept, self.state.validation["val/top1"])
        if not self.world.from_leader(marked):  # the others keep nothing and cannot know
            self._save("")

    def _validate(self, model: nn.Module) -> bool:
        """Validate; return whether it was the best validation so far."""
        config = self.config
        self.state.meter.collect()
        self.state.check_finite()
        result = evaluate(
            model,
            self.data.val,
            self.data.preprocess,
            EvalSettings(config.micro_batch_size or config.batch_size, config.workers, self.state.device),
            bad_images=self.bad_images,
            context=self.context,
        )
        values = result.metrics()
        self.sink.log(values, self.state.iters)
        self.reporter.metrics(self.state.iters, shown_metrics(values, config.num_classes))
        self._warn_of_only_answer(result)
        is_best = self.state.record_validation(values)
        self._tell("validation", values)
        return is_best

    def _warn_of_only_answer(self, result: EvalResult) -> None:
        """Say that every validation image is taken for one class: the first time, and after the last iteration."""
        is_last = self.state.iters == self.config.total_iters
        if result.only_answer is None or (self._warned_of_only_answer and not is_last):
            return
        self._warned_of_only_answer = True
        name = dict(enumerate(self.data.val.classes)).get(result.only_answer, result.only_answer)
        self.reporter.warn(
            f"validation at iteration {self.state.iters} takes every image for {name!r}: "
            + ("the network has learned nothing else" if is_last else "normal early in a run, a bad sign later")
        )

    def _save_once(self) -> None:
        """Save, unless this iteration has been saved already or nothing was trained."""
        if self.state.iters and self._saved_iters != self.state.iters:
            self._save("")

    def extra_state(self) -> dict[str, Any]:
        """Return further entries of the next checkpoint."""
        return {"stop_reason": self.stop_reason} if self.stop_reason else {}

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
                **self.extra_state(),
            },
            state.iters,
            tag,
            val_top1=state.validation["val/top1"] if validated else None,
        )
        self._saved_iters = state.iters
        self._tell("checkpoint", self.saved)

    def _result(self, stopped_by: int | None = None) -> TrainResult:
        state = self.state
        state.meter.collect()
        return TrainResult(
            iters=state.iters,
            epoch=self.data.order.epoch_of(state.iters),
            loss=state.current_loss(),
            validation=state.validation,
            best=state.best,
            checkpoint=self.store.finish() or self._resumed_from,
            stopped_by=stopped_by,
            ended_by_patience=stopped_by is None and not self.stop_reason and state.iters < self.config.total_iters,
            stop_reason=self.stop_reason,
            pause_reason=self.pause_reason if stopped_by is not None else "",
        )


def _gradients_kept_here(network: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients in this process only, until a backward pass outside the block."""
    inner = getattr(network, "_orig_mod", network)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()
