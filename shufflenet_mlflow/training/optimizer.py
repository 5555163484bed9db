"""Optimizer: parameter groups, schedule of the learning rate, moving average."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shufflenet_mlflow.models.parts import parts_of

BETA2 = 0.999
"""AdamW's second beta; the first is the momentum."""

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 1.0,
}
"""Schedule -> the learning rate's factor as a function of progress, from 0 to 1."""


def parameter_groups(
    model: nn.Module, weight_decay: float, *, lr: float = 0.0, head_lr_factor: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return two groups: tensors of two or more dimensions with weight decay, biases and BN parameters without.

    If rates differ, there are two groups for each rate, and `lr_factor` in a group is its rate over `lr`.

    Args:
        head_lr_factor: factor of the classifier's rate.
        layer_decay: factor of the rate from each part of the network to the part before it; see `parts_of`.
    """
    if head_lr_factor == layer_decay == 1:
        return _by_decay(list(model.parameters()), weight_decay)
    by_factor: dict[float, dict[nn.Parameter, None]] = {}
    parts = parts_of(model)
    seen: set[nn.Parameter] = set()
    for distance, part in enumerate(reversed(parts)):
        factor = layer_decay**distance * (1 if distance else head_lr_factor)
        of_part = {parameter: None for module in part for parameter in module.parameters() if parameter not in seen}
        by_factor.setdefault(factor, {}).update(of_part)
        seen.update(of_part)
    return [
        {**group, "lr": lr * factor, "lr_factor": factor}
        for factor, parameters in by_factor.items()
        for group in _by_decay(list(parameters), weight_decay)
        if group["params"]
    ]


def _by_decay(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    undecayed = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    fused: bool = False,
    name: str = "sgd",
    head_lr_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> SGD | AdamW:
    """Return SGD or AdamW over `parameter_groups`.

    Args:
        momentum: of SGD; AdamW's first beta.
        fused: one kernel per step, on a CPU or with CUDA. Not with a loss scaler: if the first scale is too high,
            PyTorch's fused SGD leaves the momentum uninitialised. Nor where an iteration leaves out parameters: it
            fails where some have a momentum and others do not yet.
        name: `sgd` or `adamw`.
    """
    groups = parameter_groups(model, weight_decay, lr=lr, head_lr_factor=head_lr_factor, layer_decay=layer_decay)
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=(momentum, BETA2), fused=fused)
    return SGD(groups, lr=lr, momentum=momentum, fused=fused)


def rate_factor(schedule: str, total_iters: int, warmup_iters: int = 0) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of completed iterations.

    It rises linearly to 1 during the warm-up; then it is 1, falling to 0 at `total_iters` unless it is constant.
    """
    shape = SHAPES[schedule]

    def factor(iters: int) -> float:
        if iters < warmup_iters:
            return (iters + 1) / (warmup_iters + 1)
        return shape(min(1.0, (iters - warmup_iters) / (total_iters - warmup_iters)))

    return factor


def make_scheduler(
    optimizer: Optimizer, total_iters: int, *, schedule: str = "linear", warmup_iters: int = 0
) -> LambdaLR:
    """Return a schedule that is stepped once per iteration."""
    return LambdaLR(optimizer, rate_factor(schedule, total_iters, warmup_iters))


def clip_gradients(optimizer: Optimizer, norm: float) -> None:
    """Scale all gradients down so that their norm, taken together, is at most `norm`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a moving average of weights and BN statistics: average = decay * average + (1 - decay) * model."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
