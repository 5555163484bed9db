"""The training state: everything that changes during training, saved to and restored from checkpoints."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from shufflenet_mlflow.checkpoints.loading import load_checkpoint
from shufflenet_mlflow.config import TrainConfig
from shufflenet_mlflow.errors import CheckpointError, NonFiniteLossError
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.training.meter import Meter
from shufflenet_mlflow.training.rng import StepRandomness


class TrainingState:
    """Network, optimizer, schedule and progress.

    Args:
        ema: the moving average of the network's weights, if any.
        scaler: scales the loss so that gradients in float16 do not vanish.
        seed: of the network's own draws, such as dropout.
        world: the processes that train together; by default this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SGD,
        scheduler: LambdaLR,
        device: torch.device,
        *,
        ema: AveragedModel | None = None,
        scaler: GradScaler | None = None,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.device = device
        self.ema = ema
        self.scaler = scaler
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

    @property
    def evaluated_model(self) -> nn.Module:
        """The network to evaluate: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the next iteration."""
        lr: float = self.optimizer.param_groups[0]["lr"]
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
        self.iters += 1

    def check_finite(self) -> None:
        """Check the losses so far; waits for the device.

        Raises:
            NonFiniteLossError: one of them was NaN or infinite.
        """
        bad = self.meter.first_bad()
        if bad is not None:
            lr = self.scheduler.base_lrs[0] * self.scheduler.lr_lambdas[0](bad - 1)
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
            return False
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
            "rng_state": self.randomness.state_dict(),
            "meter_state": self.meter.state_dict(),
        }

    def load_state_dict(self, payload: Mapping[str, Any], config: TrainConfig) -> None:
        """Restore a checkpoint, with learning rate, momentum and weight decay of `config`, which a fork may change.

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
            self.scheduler.load_state_dict(payload["lr_scheduler_state_dict"])
            self.meter.load_state_dict(payload["meter_state"])
            self.iters = int(payload["iters"])
            self.loss = float(payload["loss"])
            self.validated_iters = int(metrics.pop("validated_iters"))
            self.validation = metrics
            self.best = payload["best"]
            self.randomness.load_state_dict(payload["rng_state"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be resumed from: {type(error).__name__} {error}; it may hold weights only",
                code="resume-state-invalid",
            ) from error
        factor = self.scheduler.lr_lambdas[0](self.iters)
        for group, decay in zip(self.optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
            group.update(initial_lr=config.lr, lr=config.lr * factor, momentum=config.momentum, weight_decay=decay)
        self.scheduler.base_lrs = [config.lr for _ in self.optimizer.param_groups]

    def _load_optimizer(self, state_dict: Mapping[str, Any]) -> None:
        """Load the optimizer's state, but keep this one's implementation and the memory format of its tensors."""
        fused = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(dict(state_dict))
        for group in self.optimizer.param_groups:
            group.update(fused=fused, foreach=None)
            for parameter in group["params"]:
                parameter_state = self.optimizer.state.get(parameter, {})
                for name, value in parameter_state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        parameter_state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
