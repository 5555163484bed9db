"""Distillation: the network learns from the labels and from another network's answers; Hinton et al., 2015."""

import hashlib
from collections.abc import Mapping
from unicodedata import normalize

import torch
from torch import Tensor
from torch.nn import functional

from shufflenet_mlflow.data.preprocess import Preprocess, ToInput
from shufflenet_mlflow.models.loaded import LoadedModel
from shufflenet_mlflow.runtime.devices import move_model

WEIGHT = 0.5
"""Share of the loss that the teacher's answers have; the labels have the rest."""
TEMPERATURE = 2.0
"""Both networks' logits are divided by it before they are compared."""


def digest_of(teacher: "Teacher") -> str:
    """Return a hash of a teacher's weights, by which a resumed run knows it again."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(teacher.network.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


class Teacher:
    """A trained network that sees the same images as the one that learns, in its own input size and normalisation.

    Args:
        network: its classes are those of the training set; their order may be another.
        class_to_idx: the training set's classes.
        preprocess: that of the network that learns.
    """

    def __init__(
        self, network: LoadedModel, class_to_idx: Mapping[str, int], preprocess: Preprocess, device: torch.device
    ) -> None:
        self.network = move_model(network.module, device).eval().requires_grad_(requires_grad=False)
        self._to_input = ToInput(network.preprocess, device)
        self._size = network.preprocess.input_size
        self._reverses_channels = network.preprocess.settings.channels != preprocess.settings.channels
        own = {normalize("NFC", name): label for name, label in (network.class_to_idx or class_to_idx).items()}
        order = [own[normalize("NFC", name)] for name in sorted(class_to_idx, key=lambda name: class_to_idx[name])]
        self._order = torch.tensor(order, device=device)

    @torch.no_grad()
    def answers(self, pixels_NCHW: Tensor) -> Tensor:
        """Return logits of the training set's classes, (N, classes).

        Args:
            pixels_NCHW: float on the 0-255 scale, in the channel order of the network that learns.
        """
        if self._reverses_channels:
            pixels_NCHW = pixels_NCHW.flip(1)
        if pixels_NCHW.shape[-1] != self._size:
            pixels_NCHW = functional.interpolate(
                pixels_NCHW, (self._size, self._size), mode="bilinear", align_corners=False, antialias=True
            )
        logits: Tensor = self.network(self._to_input.normalise(pixels_NCHW))
        return logits[:, self._order]

    def blend(self, loss: Tensor, logits_NC: Tensor, pixels_NCHW: Tensor) -> Tensor:
        """Return the loss with the distance from the teacher's answers blended in."""
        answers = self.answers(pixels_NCHW).float()
        logits = logits_NC[:, : answers.shape[1]].float()
        distance = functional.kl_div(
            (logits / TEMPERATURE).log_softmax(1),
            (answers / TEMPERATURE).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * distance
