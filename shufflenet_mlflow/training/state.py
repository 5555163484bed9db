"""The training state: everything that changes during training, saved to and restored from checkpoints."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from shufflenet_mlflow.checkpoints.loading import load_checkpoint
from shufflenet_mlflow.config import RunConfig
from shufflenet_mlflow.errors import CheckpointError, NonFiniteLossError
from shufflenet_mlflow.models.parts import frozen_modules
from shufflenet_mlflow.runtime.devices import repeat_exactly
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.training.batchnorm import freeze
from shufflenet_mlflow.training.meter import Meter
from shufflenet_mlflow.training.optimizer import clip_gradients, make_ema, make_optimizer, make_scheduler
from shufflenet_mlflow.training.rng import StepRandomness


@runtime_checkable
class PathNetwork(Protocol):
    """A network of which each iteration trains a part, the same in every process; otherwise it is another part."""

    def begin_iteration(self, seed: int, iters: int) -> None:
        """Take the part of the iteration after `iters` completed ones."""

    def end_iteration(self) -> None:
        """Take the part that is validated."""


class TrainingState:
    """Network, optimizer, schedule and progress.

    Args:
        ema: the moving average of the network's weights, if any.
        scaler: scales the loss so that gradients in float16 do not vanish.
        clip_norm: largest norm of all gradients together; 0: any.
        seed: of the network's own draws, such as dropout.
        world: the processes that train together; by default this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        device: torch.device,
        *,
        ema: AveragedModel | None = None,
        scaler: GradScaler | None = None,
        clip_norm: float = 0.0,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.device = device
        self.ema = ema
        self.scaler = scaler
        self.clip_norm = clip_norm
        self.seed = seed
        self.randomness = StepRandomness(seed)
        self.meter = Meter(device, world)
        self.iters = 0
        self.loss = math.nan
        """Mean training loss at the last report; see `current_loss`."""
        self.validation: dict[str, float] = {}
        """Metrics of the last validation."""
        self.validated_iters = 0
        """Iteration of the last validation."""
        self.best: dict[str, float] | None = None
        """`val_top1` and `iters` of the best validation so far."""
        self.validations_since_best = 0

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: nn.Module,
        device: torch.device,
        iters_per_epoch: int,
        *,
        optimizer: Optimizer | None = None,
        world: World | None = None,
    ) -> "TrainingState":
        """Return the state before the first iteration that a configuration describes.

        Args:
            model: on the device.
            optimizer: in the place of the configuration's; the schedule scales its rates.

        Raises:
            ConfigError: more stages are to be frozen than there are.
        """
        repeat_exactly(device)
        freeze(frozen_modules(model, config.freeze))
        if optimizer is None:
            optimizer = make_optimizer(
                model,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                fused=device.type in ("cpu", "cuda") and config.amp != "fp16" and not isinstance(model, PathNetwork),
                name=config.optimizer,
                head_lr_factor=config.head_lr_factor,
                layer_decay=config.layer_decay,
            )
        warmup_iters = config.warmup_iters(iters_per_epoch)
        return cls(
            model,
            optimizer,
            make_scheduler(optimizer, config.total_iters, schedule=config.schedule, warmup_iters=warmup_iters),
            device,
            ema=make_ema(model, config.ema_decay) if config.ema_decay else None,
            scaler=GradScaler(device.type) if config.amp == "fp16" else None,
            clip_norm=config.clip_norm,
            seed=config.seed,
            world=world,
        )

    @property
    def trains_parts(self) -> bool:
        """Whether an iteration leaves a part of the network as it is."""
        return isinstance(self.model, PathNetwork)

    def begin_iteration(self) -> None:
        """Draw what is drawn once per iteration, the same in every process."""
        self.randomness.begin_iteration()
        if isinstance(self.model, PathNetwork):
            self.model.begin_iteration(self.seed, self.iters)

    @property
    def evaluated_model(self) -> nn.Module:
        """The network to evaluate: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def model_to_validate(self, reestimate: Callable[[nn.Module], object]) -> nn.Module:
        """Return the network to validate during training.

        Args:
            reestimate: replaces a network's BN statistics; used for a copy of one that trains parts, whose own
                statistics are of all parts.
        """
        if not self.trains_parts:
            return self.evaluated_model
        model = copy.deepcopy(self.evaluated_model)
        reestimate(model)
        return model

    @property
    def lr(self) -> float:
        """The learning rate of the next iteration, before the factors of single parts of the network."""
        group = self.optimizer.param_groups[0]
        lr: float = group["lr"] / group.get("lr_factor", 1.0)
        return lr

    def current_loss(self) -> float:
        """Return the mean training loss since the last report, or the one reported if no iteration followed."""
        mean = self.meter.means()["train/loss"]
        return self.loss if math.isnan(mean) else mean

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Update weights, learning rate and moving average from the accumulated gradients.

        If the loss scale was too high, the weights stay unchanged and the scale is lowered.
        """
        if self.clip_norm:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            clip_gradients(self.optimizer, self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
            self.scheduler.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            with warnings.catch_warnings():  # the first scales are often too high
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        if isinstance(self.model, PathNetwork):
            self.model.end_iteration()
        self.iters += 1

    def check_finite(self) -> None:
        """Check the losses so far; waits for the device.

        Raises:
            NonFiniteLossError: one of them was NaN or infinite.
        """
        bad = self.meter.first_bad()
        if bad is not None:
            factor = self.optimizer.param_groups[0].get("lr_factor", 1.0)
            lr = self.scheduler.base_lrs[0] / factor * self.scheduler.lr_lambdas[0](bad - 1)
            raise NonFiniteLossError(
                f"the loss became NaN or infinite at iteration {bad}, with a learning rate of {lr:.6g}; "
                "start again with a lower --lr",
                code="loss-not-finite",
            )

    def record_validation(self, values: dict[str, float]) -> bool:
        """Record a validation's metrics and return whether its `val/top1` is the best so far; NaN never is."""
        self.validation, self.validated_iters = values, self.iters
        top1 = values["val/top1"]
        if math.isnan(top1) or (self.best is not None and top1 <= self.best["val_top1"]):
            self.validations_since_best += 1
            return False
        self.validations_since_best = 0
        self.best = {"val_top1": top1, "iters": self.iters}
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the training state's entries of a checkpoint (see `checkpoints.schema`); tensors are not copied."""
        optional: dict[str, Any] = {}
        if self.ema is not None:
            optional["ema_state_dict"] = self.ema.module.state_dict()
        if self.scaler is not None:
            optional["scaler_state_dict"] = self.scaler.state_dict()
        return {
            "state_dict": self.model.state_dict(),
            **optional,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "lr_scheduler_state_dict": self.scheduler.state_dict(),
            "loss": self.current_loss(),
            "metrics": {**self.validation, "validated_iters": self.validated_iters},
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "rng_state": self.randomness.state_dict(),
            "meter_state": self.meter.state_dict(),
        }

    def load_state_dict(self, payload: Mapping[str, Any]) -> None:
        """Restore a checkpoint, but keep the optimizer's settings, such as its rates, which a fork may change.

        Raises:
            CheckpointError: it holds weights only, or state of another kind.
        """
        try:
            metrics = dict(payload["metrics"])
            load_checkpoint(self.model, payload, ema=False)
            if self.ema is not None:
                load_checkpoint(self.ema.module, payload)  # the weights, if a fork introduces the average
                self.ema.n_averaged.fill_(1)  # 0 would replace the average by the next weights
            if self.scaler is not None and "scaler_state_dict" in payload:  # a fork may introduce the scaler
                self.scaler.load_state_dict(payload["scaler_state_dict"])
            self._load_optimizer(payload["optimizer_state_dict"])
            self._load_scheduler(payload["lr_scheduler_state_dict"], int(payload["iters"]))
            self.meter.load_state_dict(payload["meter_state"])
            self.iters = int(payload["iters"])
            self.loss = float(payload["loss"])
            self.validated_iters = int(metrics.pop("validated_iters"))
            self.validation = metrics
            self.best = payload["best"]
            self.validations_since_best = int(payload.get("validations_since_best", 0))
            self.randomness.load_state_dict(payload["rng_state"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be resumed from ({type(error).__name__} {error}); --init-from starts with its "
                "weights",
                code="resume-state-invalid",
            ) from error

    def _load_optimizer(self, state_dict: Mapping[str, Any]) -> None:
        """Load the optimizer's state, but keep this one's settings and the memory format of its tensors."""
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(dict(state_dict))
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
            for parameter in group["params"]:
                parameter_state = self.optimizer.state.get(parameter, {})
                for name, value in parameter_state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        parameter_state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)

    def _load_scheduler(self, state_dict: Mapping[str, Any], iters: int) -> None:
        """Load the schedule's state, but keep this one's rates."""
        self.scheduler.load_state_dict(dict(state_dict))
        factor = self.scheduler.lr_lambdas[0](iters)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
