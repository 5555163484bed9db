"""The cost of a network: parameters, and multiply-accumulates for one image."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shufflenet_mlflow.models.catalog import create_model


@dataclass(frozen=True)
class Cost:
    """Size of a network, and work for one image."""

    parameters: int
    """Number of parameters."""
    macs: int
    """Multiply-accumulates of convolutions and linear layers for one image, in evaluation mode."""


def model_cost(name: str, num_classes: int = 1000, input_size: int = 224, **options: Any) -> Cost:
    """Count a network's cost on the meta device, where nothing is allocated or computed; results are cached.

    Args:
        name: as for `create_model`.
        num_classes: width of the classifier.
        input_size: height and width of the image.
        options: further arguments of `create_model`; each is a list of numbers, or None.

    Raises:
        ModelError: see `create_model`.
    """
    return _count(name, num_classes, input_size, tuple((key, value and tuple(value)) for key, value in options.items()))


@cache
def _count(name: str, num_classes: int, input_size: int, options: tuple[tuple[str, Any], ...]) -> Cost:
    with torch.device("meta"):
        model = create_model(name, num_classes, **dict(options)).eval()
        image_NCHW = torch.empty(1, 3, input_size, input_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image_NCHW)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)
