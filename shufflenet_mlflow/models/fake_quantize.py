"""Fake quantisation: a network that computes in floating point with the rounding of an int8 runtime.

The scheme is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, sections 2 and 3, as ONNX writes it down. Weights have a scale for each output
channel and no zero point. Activations have one scale and a zero point for each tensor, taken from a calibration and
then fixed. Batch normalisation is folded into the convolution before it, with its statistics as they are. In training,
the gradient passes through the rounding, and stops where a number is cut off.

The first convolution, which sees pixels and takes little of the time, and auxiliary heads stay as they are.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shufflenet_mlflow.checkpoints.loading import AUXILIARY_PREFIX
from shufflenet_mlflow.models.batchnorm import FoldedBatchNorm2d, FrozenBatchNorm2d

LARGEST_WEIGHT, LARGEST_ACTIVATION = 127, 255
SCALES = ("input_scale", "output_scale")
"""Names of the tensors that calibration sets: [scale, zero point] of a layer's input, and of its output."""

_LARGEST_BIAS = 2.0**30
"""Biases are sums' units, 32 bits wide; half of that is left to the sum itself."""
_SMALLEST_SCALE = 1e-12


def rounded(x: Tensor, scale: Tensor | float, zero: Tensor | float, lowest: int, highest: int) -> Tensor:
    """Return numbers rounded to whole multiples of `scale`, of which those from `lowest - zero` to `highest - zero`.

    Halves are rounded to even, before the zero point is added, as ONNX's QuantizeLinear does.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        passed_through: Tensor = _StraightThrough.apply(x, scale, zero, lowest, highest)
        return passed_through
    return (torch.round(x / scale) + zero).clamp(lowest, highest).sub(zero).mul(scale)


class _StraightThrough(torch.autograd.Function):
    """The rounding, with a gradient that passes it unchanged, except where a number was cut off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | float, zero: Tensor | float, lowest: int, highest: int) -> Tensor:
        levels = torch.round(x / scale).add_(zero)
        ctx.save_for_backward((levels >= lowest) & (levels <= highest))
        return levels.clamp_(lowest, highest).sub_(zero).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        [is_inside] = ctx.saved_tensors
        return grad * is_inside, None, None, None, None


Observer = Callable[["FakeQuantized", str, Tensor], None]
"""Is given a layer, a name in `SCALES`, and the tensor that is quantised there."""


class FakeQuantized(nn.Module):
    """A convolution or linear layer with fake quantisation; `_become` makes one of a layer.

    Its attributes beside those of the layer: `bn`, a tuple of the batch normalisation that is folded into it, or
    nothing; `has_relu`, whether a ReLU follows; `observer`, while it is calibrated; `constants`, once it has settled.
    """

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor
    output_scale: Tensor | None
    """None if the output needs no scale: another layer of this kind is all that sees it, or it is the logits."""
    bn: tuple[nn.BatchNorm2d, ...]
    has_relu: bool
    observer: Observer | None
    constants: "Constants | None"

    def apply_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer computes with another weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.constants is not None:
            weight, bias = self.weight, self.bias
        else:
            weight, bias = self._folded()
            if self.observer is None:
                weight, bias, _ = self._quantized(weight, bias)
        y = self.apply_layer(self._rounded(x, "input_scale"), weight, bias)
        if self.has_relu:
            y = functional.relu(y)
        return y if self.output_scale is None else self._rounded(y, "output_scale")

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the layer together with its batch normalisation."""
        if not self.bn:
            return self.weight, self.bias
        [bn] = self.bn
        mean, variance = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
        factor_C = torch.rsqrt(variance + bn.eps) * (1.0 if bn.weight is None else bn.weight)
        bias_C = -mean * factor_C if self.bias is None else (self.bias - mean) * factor_C
        return self.weight * factor_C.reshape(-1, 1, 1, 1), bias_C if bn.bias is None else bias_C + bn.bias

    def _quantized(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return weight and bias, rounded, and the scale of each output channel.

        A channel of small weights and a large bias gets a larger scale, so that 32 bits are enough for the bias.
        """
        scale_C = weight.detach().abs().flatten(1).amax(1) / LARGEST_WEIGHT
        if bias is not None:
            scale_C = torch.maximum(scale_C, bias.detach().abs() / (self.input_scale[0] * _LARGEST_BIAS))
        scale_C = scale_C.clamp_min(_SMALLEST_SCALE)
        by_channel = scale_C.reshape(-1, *(1,) * (weight.dim() - 1))
        weight = rounded(weight, by_channel, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        if bias is not None:
            unit_C = self.input_scale[0] * scale_C
            bias = bias + (torch.round(bias / unit_C) * unit_C - bias).detach()
        return weight, bias, scale_C

    def _rounded(self, x: Tensor, name: str) -> Tensor:
        """Return activations rounded and cut off; unchanged while the layer is calibrated."""
        if self.observer is not None:
            self.observer(self, name, x)
            return x
        scale, zero = getattr(self, name)
        return rounded(x, scale, zero, 0, LARGEST_ACTIVATION)

    @torch.no_grad()
    def settle(self) -> None:
        """Turn what follows from weights and scales into constants, with the same results, for evaluation only."""
        weight, bias, scale_C = self._quantized(*self._folded())
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        self.constants = Constants(scale_C)


@dataclass(frozen=True)
class Constants:
    """Facts of a layer that has settled: its weight and bias are rounded, and belong to these."""

    weight_scale: Tensor
    """(D,): of each output channel. That of the bias is this one times the scale of the input."""


class FakeQuantConv2d(FakeQuantized, nn.Conv2d):
    """A convolution, (N, C, H, W) -> (N, D, H', W')."""

    def apply_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class FakeQuantLinear(FakeQuantized, nn.Linear):  # type: ignore[misc]  # its bias may be None
    """A linear layer, (N, C) -> (N, D)."""

    def apply_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)


def fake_quantize(model: nn.Module) -> nn.Module:
    """Convert a network in place, and return it; `calibrate` or a checkpoint then sets its scales.

    Tensors keep their names; `SCALES` of the layers are new.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear) and not name.startswith(AUXILIARY_PREFIX)
    ]
    first = next((module for _, module in layers if isinstance(module, nn.Conv2d)), None)
    chosen = {module for _, module in layers if module is not first}
    for name, sequence in list(model.named_modules()):
        is_plain = isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward
        if is_plain and not name.startswith(AUXILIARY_PREFIX):
            _convert_sequence(cast(nn.Sequential, sequence), chosen)
    for module in chosen:
        if not isinstance(module, FakeQuantized):
            _become(module, has_output=isinstance(module, nn.Conv2d))
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d and not name.startswith(AUXILIARY_PREFIX):
            module.__class__ = FrozenBatchNorm2d
            module.eval()
    return model


def _convert_sequence(sequence: nn.Sequential, chosen: set[nn.Module]) -> None:
    """Convert the layers of a sequence, each with the batch normalisation and the ReLU that follow it."""
    names = [name for name, module in sequence._modules.items() if not isinstance(module, nn.Identity)]
    for position, name in enumerate(names):
        layer = sequence._modules[name]
        if layer not in chosen or not isinstance(layer, nn.Conv2d):
            continue
        following = names[position + 1 :]
        bn = sequence._modules[following[0]] if following else None
        if isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None:
            following = following[1:]
        else:
            bn = None
        has_relu = bool(following) and isinstance(sequence._modules[following[0]], nn.ReLU)
        if has_relu:
            sequence._modules[following[0]] = nn.Identity()
            following = following[1:]
        feeds_another = bool(following) and sequence._modules[following[0]] in chosen
        _become(layer, bn=bn, has_relu=has_relu, has_output=not feeds_another)


def _become(layer: nn.Module, *, bn: nn.BatchNorm2d | None = None, has_relu: bool = False, has_output: bool) -> None:
    """Turn a layer into one with fake quantisation."""
    layer.__class__ = FakeQuantConv2d if isinstance(layer, nn.Conv2d) else FakeQuantLinear
    converted = cast(FakeQuantized, layer)
    unset = torch.tensor([1.0, 0.0], device=converted.weight.device)
    layer.register_buffer("input_scale", unset)
    layer.register_buffer("output_scale", unset.clone() if has_output else None)
    if bn is not None:
        bn.__class__ = FoldedBatchNorm2d
        bn.eval()
    converted.bn = () if bn is None else (bn,)  # in a tuple, so that its tensors keep their only name
    converted.has_relu, converted.observer, converted.constants = has_relu, None, None


def layers_of(model: nn.Module) -> Iterator[FakeQuantized]:
    """Yield the layers with fake quantisation."""
    return (module for module in model.modules() if isinstance(module, FakeQuantized))


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that calibration sets, by their names in the state dict."""
    return {name: value for name, value in model.state_dict().items() if name.rpartition(".")[2] in SCALES}


# ---------------------------------------------------------------- calibration

SHRUNK = tuple(1 - 0.03 * step for step in range(20))
"""Fractions of the whole range of an activation that are tried."""


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Callable[[], Iterable[Tensor]]) -> None:
    """Set all scales of activations from images.

    Each is the one, of some that cover the whole range or a part of it, with the least mean squared error.

    Args:
        inputs: yields the same batches in each call, float (N, 3, H, W) on the model's device.
    """
    lows: dict[tuple[FakeQuantized, str], Tensor] = {}
    highs: dict[tuple[FakeQuantized, str], Tensor] = {}
    errors: dict[tuple[FakeQuantized, str], Tensor] = {}
    candidates: dict[tuple[FakeQuantized, str], list[Tensor]] = {}

    def measure_range(layer: FakeQuantized, name: str, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        key = layer, name
        lows[key], highs[key] = torch.minimum(lows.get(key, low), low), torch.maximum(highs.get(key, high), high)

    def measure_error(layer: FakeQuantized, name: str, x: Tensor) -> None:
        key = layer, name
        found = [
            (rounded(x, scale, zero, 0, LARGEST_ACTIVATION) - x).square().mean() for scale, zero in candidates[key]
        ]
        errors[key] = errors.get(key, torch.zeros_like(torch.stack(found))) + torch.stack(found)

    was_training = model.training
    model.eval()
    try:
        _observe(model, inputs(), measure_range)
        for key in lows:
            candidates[key] = [scale_of(lows[key] * share, highs[key] * share) for share in SHRUNK]
        _observe(model, inputs(), measure_error)
    finally:
        model.train(was_training)
    for (layer, name), error in errors.items():
        getattr(layer, name).copy_(candidates[layer, name][int(error.argmin())])


def scale_of(low: Tensor, high: Tensor) -> Tensor:
    """Return [scale, zero point] for numbers from `low` to `high`; 0 is always one of them, and exact."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / LARGEST_ACTIVATION).clamp_min(_SMALLEST_SCALE)
    return torch.stack((scale, torch.round(-low / scale).clamp(0, LARGEST_ACTIVATION)))


def _observe(model: nn.Module, inputs: Iterable[Tensor], observer: Observer) -> None:
    layers = list(layers_of(model))
    try:
        for layer in layers:
            layer.observer = observer
        for images in inputs:
            model(images)
    finally:
        for layer in layers:
            layer.observer = None
