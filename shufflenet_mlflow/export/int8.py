"""int8 for ONNX Runtime and OpenVINO: the network of `models.fake_quantize`, written down with integers.

Each quantised layer gets the operations that quantise and dequantise (QDQ) its input, weight, bias and output; runtimes
with integer kernels merge them. The labels of the file are those of the network with fake quantisation, which is a
checkpoint's own after `train --qat`, and otherwise made here, with scales from a calibration on images.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shufflenet_mlflow.data.preprocess import ToInput
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.export.program import PixelsToLogits
from shufflenet_mlflow.models.fake_quantize import SCALES, FakeQuantized, calibrate, fake_quantize
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.loaded import LoadedModel

_BATCH = 30
LOWEST = 0.5
"""Share of equal labels below which a quantised program is taken for broken."""


@dataclass(frozen=True)
class Calibration:
    """Images that show which numbers occur between the layers."""

    pixels_NCHW: Tensor
    """uint8 (N, 3, S, S), resized and cropped as in evaluation."""
    source: str
    """Name of the set of images."""
    digest: str
    """Digest of the set that they were taken from."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the exported file says of them."""
        return {"images": len(self.pixels_NCHW), "source": self.source, "digest": self.digest}


def quantized(network: LoadedModel, calibration: Calibration) -> LoadedModel:
    """Return the network with fake quantisation; itself if it was trained with it."""
    if network.spec.fake_quantized:
        return network
    module = fake_quantize(copy.deepcopy(network.module).cpu()).eval()
    to_input = ToInput(network.preprocess, torch.device("cpu"))
    calibrate(module, lambda: map(to_input, torch.split(calibration.pixels_NCHW, _BATCH)))
    return replace(network, module=module, spec=replace(network.spec, fake_quantized=True))


def in_integers(network: LoadedModel) -> LoadedModel:
    """Return a network with fake quantisation as one that PyTorch can only export to ONNX."""
    module = fuse_bn(network.module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, FakeQuantized):
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, _Integers(layer))
    return replace(network, module=module)


class _Integers(nn.Module):
    """A layer with fake quantisation, in ONNX's operations; shapes are the layer's."""

    def __init__(self, layer: FakeQuantized) -> None:
        super().__init__()
        assert layer.constants is not None  # noqa: S101 - `fuse_bn` settles every layer
        self.layer = (layer,)  # in a tuple, so that its weights are not exported
        scale_C, weight = layer.constants.weight_scale, layer.weight.detach()
        by_channel = scale_C.reshape(-1, *(1,) * (weight.dim() - 1))
        self.register_buffer("weight", torch.round(weight / by_channel).to(torch.int8))
        self.register_buffer("weight_scale", scale_C)
        # ONNX Runtime before 1.24 wants a zero point for the weights of linear layers.
        is_linear = isinstance(layer, nn.Linear)
        self.register_buffer("weight_zero", torch.zeros(len(scale_C), dtype=torch.int8) if is_linear else None)
        unit_C = layer.input_scale[0] * scale_C
        bias = None if layer.bias is None else torch.round(layer.bias.detach() / unit_C).to(torch.int32)
        self.register_buffer("bias", bias)
        self.register_buffer("bias_scale", None if bias is None else unit_C)
        for name in SCALES:
            value = getattr(layer, name)
            self.register_buffer(name, None if value is None else value[0].clone())
            self.register_buffer(f"{name}_zero", None if value is None else value[1].to(torch.uint8))

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        [layer] = self.layer
        x = self._rounded(x, "input_scale")
        weight, bias = self._dequantized("weight"), None if self.bias is None else self._dequantized("bias")
        y = layer.apply_layer(x, weight, bias)
        if layer.has_relu:
            y = functional.relu(y)
        return y if layer.output_scale is None else self._rounded(y, "output_scale")

    def _rounded(self, x: Tensor, name: str) -> Tensor:
        scale, zero = getattr(self, name), getattr(self, f"{name}_zero")
        levels = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape)
        return _dequantize(levels, scale, zero, {})

    def _dequantized(self, name: str) -> Tensor:
        zero = getattr(self, f"{name}_zero", None)
        return _dequantize(getattr(self, name), getattr(self, f"{name}_scale"), zero, {"axis": 0})


def _dequantize(levels: Tensor, scale: Tensor, zero: Tensor | None, attributes: dict[str, Any]) -> Tensor:
    inputs = (levels, scale) if zero is None else (levels, scale, zero)
    result: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=levels.shape
    )
    return result


def compact(onnx: Any, model: Any) -> Any:
    """Return an ONNX model with short names, and without the shapes of what lies between its operations."""
    graph = model.graph
    del graph.value_info[:]
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    short: dict[str, str] = {}

    def shortened(name: str) -> str:
        return name if name in kept else short.setdefault(name, f"t{len(short)}")

    for tensor in graph.initializer:
        tensor.name = shortened(tensor.name)
    for number, node in enumerate(graph.node):
        node.name = f"n{number}"
        node.input[:] = [shortened(name) for name in node.input]
        node.output[:] = [shortened(name) for name in node.output]
    onnx.checker.check_model(model)
    return model


def equal_labels(network: LoadedModel, run: Callable[[Tensor], Tensor], pixels_NCHW: Tensor) -> tuple[float, float]:
    """Compare a quantised program with the network on images.

    Returns:
        The largest difference between logits, as a fraction of the largest logit; and the share of equal labels.

    Raises:
        ExportError: the logits are not finite or have another shape, or less than `LOWEST` of the labels are equal.
    """
    module, largest, scale, equal = PixelsToLogits(network), 0.0, 1e-12, 0
    for pixels in torch.split(pixels_NCHW, _BATCH):
        with torch.inference_mode():
            expected, found = module(pixels), run(pixels)
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            raise ExportError(
                f"the quantised program gives {tuple(found.shape)}, or numbers that are not finite, for "
                f"{tuple(expected.shape)} logits of the checkpoint",
                code="export-int8-broken",
            )
        scale = max(scale, expected.abs().max().item())
        largest = max(largest, (found - expected).abs().max().item())
        equal += int((found.argmax(1) == expected.argmax(1)).sum())
    if equal < LOWEST * len(pixels_NCHW):
        raise ExportError(
            f"the quantised program gives the checkpoint's label to {equal} of {len(pixels_NCHW)} calibration images "
            "only; leave --int8 out, or choose another --format",
            code="export-int8-differs",
        )
    return largest / scale, equal / len(pixels_NCHW)
