"""Export a network as a program that PyTorch runs without the network's code, with a description of its input and
output."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.data.preprocess import ToInput, eval_transform
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.models.loaded import LoadedModel

INPUT, OUTPUT = "images", "logits"
"""Names of a program's input and output."""

TOLERANCE = 1e-4
"""Largest difference between a program's logits and the network's, as a fraction of the largest logit."""

_BATCHES = (2, 1, 5)
"""Sizes of the batches that are compared."""


class PixelsToLogits(nn.Module):
    """A network on uint8 pixels (N, 3, S, S), in the preprocessing's channel order; returns float32 logits (N,
    classes)."""

    def __init__(self, network: LoadedModel) -> None:
        super().__init__()
        self.network = network.module.cpu().eval()
        self._to_input = ToInput(network.preprocess, torch.device("cpu"))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self._to_input(images))
        return logits


def example_pixels(network: LoadedModel, images: int = 2) -> Tensor:
    """Return random pixels of the right shape; the same in each call."""
    generator = torch.Generator().manual_seed(images)
    size = network.preprocess.input_size
    return torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator)


def export_program(network: LoadedModel) -> torch.export.ExportedProgram:
    """Return the network in evaluation mode as a program for batches of any size."""
    module = PixelsToLogits(network)
    with torch.no_grad():
        return torch.export.export(
            module, (example_pixels(network),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )


def settings_of(network: LoadedModel) -> dict[str, Any]:
    """Return labels, and how an image becomes the program's input, as plain values.

    `serving.Classifier` uses them.
    """
    return {
        "network": network.spec.name,
        "labels": network.labels,
        "prepare": asdict(eval_transform(network.preprocess)),
        "input": f"{INPUT}: uint8 (N, 3, {network.preprocess.input_size}, {network.preprocess.input_size})",
        "output": f"{OUTPUT}: float32 (N, {network.num_classes}); softmax gives probabilities",
    }


def check_equal(network: LoadedModel, run: Callable[[Tensor], Tensor], what: str) -> float:
    """Compare a program with the network on batches of several sizes.

    Returns:
        The largest difference between logits, as a fraction of the largest logit.

    Raises:
        ExportError: it is above `TOLERANCE`.
    """
    module, largest = PixelsToLogits(network), 0.0
    for size in _BATCHES:
        pixels = example_pixels(network, size)
        with torch.inference_mode():
            expected, found = module(pixels), run(pixels)
        if found.shape != expected.shape:
            raise ExportError(
                f"{what} gives {tuple(found.shape)} for {size} images, the checkpoint {expected.shape}",
                code="export-shape-differs",
            )
        scale = max(1e-12, expected.abs().max().item())
        difference = (found - expected).abs().max().item() / scale
        if not difference <= TOLERANCE:  # also true if it is NaN
            raise ExportError(
                f"{what} differs from the checkpoint by {difference:.2e} of the largest logit (> {TOLERANCE:g})",
                code="export-logits-differ",
            )
        largest = max(largest, difference)
    return largest
