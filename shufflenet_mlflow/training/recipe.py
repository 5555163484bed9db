"""How the series is trained: loss, parameter groups, schedule, moving average.

Figures: the training scripts of the original release (SGD with momentum 0.9, weight decay 4e-5, label smoothing
0.1, a rate of 0.5 at batch 1,024 that falls linearly to 0 over 300,000 iterations, then BN statistics averaged
over 1,280,000 images; V2+ and Large deviate in rate, batch and length).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shufflenet_mlflow.models.catalog import get_variant

REESTIMATION_IMAGES = 1_280_000
"""At most this many training images pass to re-estimate the BN statistics; never more than one epoch."""


@dataclass(frozen=True)
class Recipe:
    """A family's published training settings."""

    batch_size: int
    lr: float
    """Rate at `batch_size`; another batch size scales it in proportion."""
    total_iters: int
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smooth: float = 0.1
    train_images: int = 1_280_000
    augment: str = "release"
    """Name of the augmentation in `shufflenet_mlflow.data.augment`."""

    @property
    def epochs(self) -> int:
        """Passes over ImageNet-1k that `total_iters` amounts to."""
        return round(self.total_iters * self.batch_size / self.train_images)

    def scaled_lr(self, batch_size: int) -> float:
        """The rate for batches of `batch_size`."""
        return self.lr * batch_size / self.batch_size


_V2 = Recipe(batch_size=1024, lr=0.5, total_iters=300_000)
_LARGE = Recipe(batch_size=256, lr=0.25, total_iters=600_000, augment="lighting")

RECIPES: dict[str, Recipe] = {
    "v1": _V2,
    "v2": _V2,
    "v2_plus": replace(_V2, total_iters=450_000),
    "oneshot": _V2,
    "detnas": _V2,
    "large": _LARGE,
    "exlarge": replace(_LARGE, augment="release"),  # no recipe was published: Large's, without its lighting noise
    "torchvision": _V2,  # not torchvision's own
}

AUXILIARY_WEIGHTS = (1.0, 0.7, 0.5, 0.3)
"""Of the losses on the main logits and on those of the heads `predict_14`, `predict_28`, `predict_56`."""


def get_recipe(model: str) -> Recipe:
    """The recipe of the network `model`'s family."""
    return RECIPES[get_variant(model).family]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on tensors of two or more dimensions; none on biases and batch normalisation."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, *, lr: float, momentum: float, weight_decay: float, fused: bool = False) -> SGD:
    """SGD over `parameter_groups`.

    Args:
        fused: one kernel for each step, on a CPU or with CUDA. Not with a loss scaler: where the first scale is too
            high, PyTorch's fused SGD leaves the momentum uninitialised.
    """
    return SGD(parameter_groups(model, weight_decay), lr=lr, momentum=momentum, fused=fused)


def linear_decay(total_iters: int) -> Callable[[int], float]:
    """Factor of the rate after `iters` iterations: 1 at the start, 0 at `total_iters` and beyond."""
    return lambda iters: max(0.0, 1.0 - iters / total_iters)


def make_scheduler(optimizer: SGD, total_iters: int) -> LambdaLR:
    """A schedule that is stepped once per iteration."""
    return LambdaLR(optimizer, linear_decay(total_iters))


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the network's weights and BN statistics: after each iteration, `decay` of what it was."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def make_loss(label_smooth: float = 0.0) -> nn.CrossEntropyLoss:
    """Cross-entropy; smoothing spreads `label_smooth` evenly over all classes."""
    return nn.CrossEntropyLoss(label_smoothing=label_smooth)


def training_loss(
    outputs: Tensor | tuple[Tensor, ...], labels: Tensor, loss_function: nn.Module
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the main logits.

    Args:
        outputs: what the network returned in training mode: (N, num_classes) logits, or four such with those of the
            auxiliary heads, whose losses are added with `AUXILIARY_WEIGHTS`.
        labels: (N,) int64.
    """
    if isinstance(outputs, Tensor):
        return loss_function(outputs, labels), outputs
    pairs = zip(AUXILIARY_WEIGHTS, outputs, strict=True)
    losses = [weight * loss_function(logits, labels) for weight, logits in pairs]
    return torch.stack(losses).sum(), outputs[0]
