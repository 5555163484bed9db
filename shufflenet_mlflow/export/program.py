"""Export a network as a program that PyTorch runs without the network's code, with a description of its input and
output."""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.data.preprocess import ToInput, eval_transform
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.models.entry_points import Registration
from shufflenet_mlflow.models.loaded import LoadedModel

Export = Callable[[LoadedModel], torch.export.ExportedProgram]
"""Makes a program of a network: `export_program`, or an `Exporter`."""

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


@functools.cache
def keep_device_guard() -> None:
    """Let a thread that never ends be the first of this process to ask torch for the guard of absent GPUs.

    Without a GPU, torch 2.10 and 2.11 built for CUDA keep that guard in memory of the thread whose export asks first.
    Once that thread has ended, as a run's delivery does, the next export would crash the process.
    """
    ensure = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    if ensure is None:
        return
    is_set = threading.Event()

    def ask_and_stay() -> None:
        ensure()
        is_set.set()
        threading.Event().wait()

    threading.Thread(target=ask_and_stay, name="device guard", daemon=True).start()
    is_set.wait()


def export_program(network: LoadedModel) -> torch.export.ExportedProgram:
    """Return the network in evaluation mode as a program for batches of any size."""
    keep_device_guard()
    module = PixelsToLogits(network)
    try:
        with torch.no_grad():
            return torch.export.export(
                module, (example_pixels(network),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except Exception as error:
        if not isinstance(network.spec.network, Registration):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "onstraints violated" in str(error):
            reason = "its code fixes the number of images, as len(x) does; x.shape[0] leaves it open"
        raise ExportError(f"{network.spec.name} cannot be exported: {reason}", code="network-not-exported") from error


class Exporter:
    """Exports several networks, one after the other; those that differ in their weights only share one program."""

    def __init__(self) -> None:
        self._last: tuple[LoadedModel, torch.export.ExportedProgram] | None = None

    def __call__(self, network: LoadedModel) -> torch.export.ExportedProgram:
        """Return the network as a program, as `export_program` does; the program returned before is of no more use."""
        if self._last is not None and self._is_like(self._last[0], network):
            program = self._last[1]
            program.state_dict.update(PixelsToLogits(network).state_dict(keep_vars=True))
        else:
            program = export_program(network)
        self._last = network, program
        return program

    @staticmethod
    def _is_like(one: LoadedModel, other: LoadedModel) -> bool:
        """Whether two networks differ in the values of their tensors only."""
        shapes = [{key: tensor.shape for key, tensor in model.module.state_dict().items()} for model in (one, other)]
        mean, other_mean = one.preprocess.mean_image, other.preprocess.mean_image
        same_mean = mean is other_mean or (
            mean is not None and other_mean is not None and torch.equal(mean, other_mean)
        )
        return one.spec == other.spec and one.preprocess == other.preprocess and same_mean and shapes[0] == shapes[1]


def settings_of(network: LoadedModel, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return labels, and how an image becomes the program's input, as plain values.

    `serving.Classifier` uses them.

    Args:
        origin: run and file that the program is made from.
    """
    return {
        **({} if origin is None else {"origin": dict(origin)}),
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
