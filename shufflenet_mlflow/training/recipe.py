"""Training recipes of the series: loss, parameter groups, schedule, moving average.

The values are those of the original release's training scripts: SGD with momentum 0.9, weight decay 4e-5, label
smoothing 0.1, a learning rate of 0.5 at batch size 1,024 that falls linearly to 0 over 300,000 iterations, then BN
statistics averaged over 1,280,000 images. V2+ and Large deviate in learning rate, batch size and length.
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
"""The most training images that BN statistics are re-estimated from; never more than one epoch."""


@dataclass(frozen=True)
class Recipe:
    """A family's published training settings."""

    batch_size: int
    lr: float
    """Learning rate at `batch_size`; it is scaled in proportion to the batch size."""
    total_iters: int
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smooth: float = 0.1
    train_images: int = 1_280_000
    """Size of ImageNet-1k as the release counts it."""
    augment: str = "release"
    """A name in `shufflenet_mlflow.data.augment.AUGMENTATIONS`."""

    @property
    def epochs(self) -> int:
        """Passes over ImageNet-1k in `total_iters` iterations."""
        return round(self.total_iters * self.batch_size / self.train_images)

    def scaled_lr(self, batch_size: int) -> float:
        """Return the learning rate for batches of `batch_size`."""
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
"""Weights of the losses on the main logits and on those of `predict_14`, `predict_28` and `predict_56`."""


def get_recipe(model: str) -> Recipe:
    """Return the recipe of a network's family.

    Raises:
        ModelError: there is no network `model`.
    """
    return RECIPES[get_variant(model).family]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: tensors of two or more dimensions with weight decay, biases and BN parameters without."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    undecayed = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, *, lr: float, momentum: float, weight_decay: float, fused: bool = False) -> SGD:
    """Return SGD over `parameter_groups`.

    Args:
        fused: one kernel per step, on a CPU or with CUDA. Not with a loss scaler: if the first scale is too high,
            PyTorch's fused SGD leaves the momentum uninitialised.
    """
    return SGD(parameter_groups(model, weight_decay), lr=lr, momentum=momentum, fused=fused)


def linear_decay(total_iters: int) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of completed iterations: 1 at 0, 0 from `total_iters` on."""
    return lambda iters: max(0.0, 1.0 - iters / total_iters)


def make_scheduler(optimizer: SGD, total_iters: int) -> LambdaLR:
    """Return a linear decay that is stepped once per iteration."""
    return LambdaLR(optimizer, linear_decay(total_iters))


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a moving average of weights and BN statistics: average = decay * average + (1 - decay) * model."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def make_loss(label_smooth: float = 0.0) -> nn.CrossEntropyLoss:
    """Return the cross-entropy loss; `label_smooth` of the target is spread evenly over all classes."""
    return nn.CrossEntropyLoss(label_smoothing=label_smooth)


def training_loss(
    outputs: Tensor | tuple[Tensor, ...], labels: Tensor, loss_function: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise, and the main logits.

    Args:
        outputs: of the network in training mode: (N, num_classes) logits, or four such, the main ones first, then
            those of the auxiliary heads; their losses are added with `AUXILIARY_WEIGHTS`.
        labels: (N,) int64.
    """
    if isinstance(outputs, Tensor):
        return loss_function(outputs, labels), outputs
    pairs = zip(AUXILIARY_WEIGHTS, outputs, strict=True)
    losses = [weight * loss_function(logits, labels) for weight, logits in pairs]
    return torch.stack(losses).sum(), outputs[0]
