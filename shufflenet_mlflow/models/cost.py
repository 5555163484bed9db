"""What a network costs: parameters, and multiply-accumulates of one image."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shufflenet_mlflow.models import get_variant


@dataclass(frozen=True)
class Cost:
    """Size and work of a network."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions and linear layers for one image."""


def count_parameters(model: nn.Module) -> int:
    """How many numbers training adjusts."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_cost(name: str, num_classes: int = 1000, input_size: int = 224) -> Cost:
    """Count on the meta device: shapes are followed, nothing is allocated or computed."""
    with torch.device("meta"):
        model = get_variant(name).build(name, num_classes).eval()
        image_NCHW = torch.empty(1, 3, input_size, input_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image_NCHW)
    return Cost(count_parameters(model), counter.get_total_flops() // 2)
