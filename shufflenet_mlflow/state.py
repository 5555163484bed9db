"""Everything that changes while a network trains, and its way into a checkpoint and back."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from shufflenet_mlflow.checkpoint import load_checkpoint
from shufflenet_mlflow.config import TrainConfig
from shufflenet_mlflow.errors import CheckpointError, NonFiniteLossError


class Meter:
    """Loss and accuracy since the last report, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        # loss * n, correct in one, correct in five, n
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._bad_iters = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, iters: int, loss: Tensor, correct1: Tensor, correct5: Tensor, size: int) -> None:
        """Add one batch: the mean loss of `size` images, and how many were right."""
        loss = loss.detach()
        counts = torch.stack((correct1, correct5)).double()
        self._sums[0] += loss.double() * size
        self._sums[1:3] += counts
        self._sums[3] += size
        first_bad = ~torch.isfinite(loss) & (self._bad_iters == 0)
        self._bad_iters += first_bad * iters

    def first_bad(self) -> int | None:
        """The first iteration whose loss was not finite; None if there was none."""
        return int(self._bad_iters.item()) or None

    def means(self) -> dict[str, float]:
        """Means over the images since the last `reset`; NaN before the first."""
        loss, top1, top5, n = self._sums.tolist()
        if not n:
            return {"train/loss": math.nan, "train/top1": math.nan, "train/top5": math.nan}
        return {"train/loss": loss / n, "train/top1": top1 / n, "train/top5": top5 / n}

    def reset(self) -> None:
        """Begin a new stretch."""
        self._sums.zero_()

    def state_dict(self) -> list[float]:
        """The sums, as plain numbers."""
        sums: list[float] = self._sums.tolist()
        return sums

    def load_state_dict(self, sums: list[float]) -> None:
        """The inverse of `state_dict`."""
        if len(sums) != len(self._sums):
            raise ValueError(f"meter_state has {len(sums)} numbers, not {len(self._sums)}")
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random generators that training draws from: dropout's and those of the device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `rng_state`; a generator that was not saved is left as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class TrainingState:
    """Network, optimizer and schedule, and where training stands."""

    def __init__(self, model: nn.Module, optimizer: SGD, scheduler: LambdaLR, device: torch.device) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.device = device
        self.meter = Meter(device)
        self.iters = 0
        self.loss = math.nan
        """Mean training loss of the last stretch that was reported; see `current_loss`."""
        self.validation: dict[str, float] = {}
        """The last validation's metrics."""
        self.validated_iters = 0
        """The iteration of the last validation."""
        self.best: dict[str, float] | None = None
        """`val_top1` and `iters` of the best validation so far."""

    @property
    def lr(self) -> float:
        """The rate of the next iteration."""
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    def current_loss(self) -> float:
        """Mean training loss since the last report, or of the stretch before it if that was just now."""
        mean = self.meter.means()["train/loss"]
        return self.loss if math.isnan(mean) else mean

    def check_finite(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteLossError: a loss since the last check was NaN or infinite.
        """
        bad = self.meter.first_bad()
        if bad is not None:
            lr = self.scheduler.base_lrs[0] * self.scheduler.lr_lambdas[0](bad - 1)
            raise NonFiniteLossError(
                f"the loss became NaN or infinite at iteration {bad}, with a learning rate of {lr:.6g}; "
                "start again with a lower --lr"
            )

    def record_validation(self, values: dict[str, float]) -> bool:
        """Keep a validation's metrics; True if its `val/top1` is the best so far. NaN never is."""
        self.validation, self.validated_iters = values, self.iters
        top1 = values["val/top1"]
        if math.isnan(top1) or (self.best is not None and top1 <= self.best["val_top1"]):
            return False
        self.best = {"val_top1": top1, "iters": self.iters}
        return True

    def state_dict(self) -> dict[str, Any]:
        """The part of a checkpoint that changes; tensors are shared with the live ones."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "lr_scheduler_state_dict": self.scheduler.state_dict(),
            "loss": self.current_loss(),
            "metrics": {**self.validation, "validated_iters": self.validated_iters},
            "best": self.best,
            "rng_state": rng_state(self.device),
            "meter_state": self.meter.state_dict(),
        }

    def load_state_dict(self, payload: Mapping[str, Any], config: TrainConfig) -> None:
        """Continue from a checkpoint, with the rates of `config`, which differ from its own in a fork.

        Raises:
            CheckpointError: it holds weights only, or state of another kind.
        """
        try:
            metrics = dict(payload["metrics"])
            load_checkpoint(self.model, payload)
            self.optimizer.load_state_dict(payload["optimizer_state_dict"])
            self.scheduler.load_state_dict(payload["lr_scheduler_state_dict"])
            self.meter.load_state_dict(payload["meter_state"])
            self.iters = int(payload["iters"])
            self.loss = float(payload["loss"])
            self.validated_iters = int(metrics.pop("validated_iters"))
            self.validation = metrics
            self.best = payload["best"]
            restore_rng_state(payload["rng_state"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be resumed from: {type(error).__name__} {error}; it may hold weights only"
            ) from error
        factor = self.scheduler.lr_lambdas[0](self.iters)
        for group, decay in zip(self.optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
            group.update(initial_lr=config.lr, lr=config.lr * factor, momentum=config.momentum, weight_decay=decay)
        self.scheduler.base_lrs = [config.lr for _ in self.optimizer.param_groups]
