"""The cost of a network: parameters, and multiply-accumulates for one image."""

import json
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shufflenet_mlflow.models.registered import random_state_kept
from shufflenet_mlflow.models.search_space import NETWORK, SEARCHED_CHOICES
from shufflenet_mlflow.models.spec import ModelSpec


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
        options: further arguments of `create_model`, as plain values.

    Raises:
        ModelError: see `create_model`.
    """
    return _count(name, num_classes, input_size, json.dumps(options))


@cache
def _count(name: str, num_classes: int, input_size: int, options: str) -> Cost:
    given = json.loads(options)
    spec = ModelSpec(name, given.pop("choices", None), given.pop("scales", None), given)
    model = spec.on_meta(num_classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if spec.is_supernet:  # it costs what the network of its path does
        model = ModelSpec(NETWORK, SEARCHED_CHOICES).on_meta(num_classes)
    if spec.traits is None:
        return Cost(parameters, _count_layers(model, input_size))
    try:
        macs = _count_macs(model, input_size)
    except Exception:  # noqa: BLE001 - another package's network may do anything on the meta device
        with random_state_kept():  # it may need the numbers
            macs = _count_macs(spec.build(num_classes), input_size)
    return Cost(parameters, macs)


def _count_layers(model: nn.Module, input_size: int) -> int:
    """Count the convolutions and linear layers of a network that has no other products."""
    return sum(macs_by_layer(model, input_size).values())


def macs_by_layer(model: nn.Module, input_size: int) -> dict[str, int]:
    """Return the multiply-accumulates of each convolution and linear layer that one image passes, by name.

    The layers are replaced, and only tell the shape of their output. PyTorch's counter, and shapes on the meta device,
    take a second to import what compiles networks, which is a second before every training.

    Args:
        model: on the meta device; of no use afterwards.
    """
    macs: dict[str, int] = {}

    def tell_shape(name: str, layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], layer.out_features) if isinstance(layer, nn.Linear) else _output_shape(layer, x)
        output = x.new_zeros(shape)
        macs[name] = macs.get(name, 0) + output.numel() * (layer.weight.numel() // len(layer.weight))
        return output

    numbers: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.forward = partial(tell_shape, name, layer)  # type: ignore[method-assign]
            continue
        own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        numbers |= {f"{name}.{key}": torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in own}
    with torch.no_grad():
        functional_call(model.eval(), numbers, torch.zeros(1, 3, input_size, input_size))
    return macs


def _output_shape(layer: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    paddings = tuple(map(int, layer.padding))
    geometry = zip(x.shape[2:], layer.kernel_size, layer.stride, paddings, layer.dilation, strict=True)
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in geometry
    ]
    return len(x), layer.out_channels, *sizes


def _count_macs(model: nn.Module, input_size: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # imports what compiles networks

    image_NCHW = torch.zeros(1, 3, input_size, input_size, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image_NCHW)
    return int(counter.get_total_flops() // 2)
