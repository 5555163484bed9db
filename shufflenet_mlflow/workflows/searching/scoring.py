"""The score of a candidate: its weights from the supernet, BN statistics of its own, its accuracy on held-out images.

Nothing else has a part in it: the images are the same for every candidate, and a CPU computes with one thread, so that
it does not matter which process scores a candidate, nor when.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput
from shufflenet_mlflow.models.catalog import create_model
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.loaded import model_from_payload
from shufflenet_mlflow.models.oneshot import ShuffleNetOneShot
from shufflenet_mlflow.models.oneshot_supernet import OneShotSupernet, inherit_path
from shufflenet_mlflow.models.search_space import NETWORK, Genes, network_of
from shufflenet_mlflow.runtime.devices import choose_device, move_model, repeat_exactly
from shufflenet_mlflow.training.batchnorm import reestimate_bn


@dataclass(frozen=True)
class Scorer:
    """Scores candidates; it can be sent to another process, and loads what it needs when it is first used."""

    checkpoint: Path
    """The supernet's, verified."""
    pixels: Path
    """See `pixels_file`."""
    preprocess: Preprocess
    device: str

    @cached_property
    def _device(self) -> torch.device:
        device = choose_device(self.device)
        repeat_exactly(device)
        return device

    @cached_property
    def _supernet(self) -> OneShotSupernet:
        module = model_from_payload(read_checkpoint(self.checkpoint), str(self.checkpoint)).module
        assert isinstance(module, OneShotSupernet)  # noqa: S101 - checked before the search
        return module

    @cached_property
    def _images(self) -> Mapping[str, list[Tensor]]:
        batches: dict[str, list[Tensor]] = torch.load(self.pixels, mmap=True, weights_only=True)
        return batches

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("checkpoint", "pixels", "preprocess", "device")}

    def network(self, genes: Genes) -> ShuffleNetOneShot:
        """Return a candidate with inherited weights and BN statistics of its own, on the device."""
        supernet = self._supernet
        choices, scales = network_of(genes)
        classes = int(supernet.num_classes)  # type: ignore[arg-type]  # a plain number
        network = create_model(NETWORK, classes, choices=choices, scales=scales)
        assert isinstance(network, ShuffleNetOneShot)  # noqa: S101 - that is its name
        inherit_path(network, supernet, genes)
        move_model(network, self._device)
        reestimate_bn([network], self._bn_inputs())
        return network.eval()

    def _bn_inputs(self) -> Iterator[Tensor]:
        to_input, images = ToInput(self.preprocess, self._device), self._images
        for number, batch_NCHW in enumerate(images["bn"]):
            yield to_input(batch_NCHW, images["shift"][number] if images["shift"] else None)

    @property
    def images(self) -> int:
        """Number of images that candidates are scored on."""
        return sum(map(len, self._images["labels"]))

    def correct(self, genes: Genes) -> int:
        """Return how many of the held-out images a candidate classifies correctly."""
        to_input, images = ToInput(self.preprocess, self._device), self._images
        network = fuse_bn(self.network(genes))
        correct = 0
        with torch.inference_mode():
            for batch_NCHW, labels_N in zip(images["scoring"], images["labels"], strict=True):
                answers_N = network(to_input(batch_NCHW)).argmax(1).cpu()
                correct += int((answers_N == labels_N).sum())
        return correct
