"""Mixing of a batch's images with each other: mixup and CutMix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.data.augment import seeded
from shufflenet_mlflow.data.sampler import derive_seed

_STREAM = 0x6D6978
"""Keeps these draws apart from others that follow from the same numbers."""


class Mixing:
    """mixup (Zhang et al., 2017) and CutMix (Yun et al., 2019); with both, one of the two is drawn each time.

    torchvision's, which blend each image with the one before it in the batch. What is drawn is a function of seed,
    iteration and micro-batch.

    Args:
        mixup, cutmix: alpha of the Beta distribution from which shares are drawn; 0 leaves it out.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int) -> None:
        self._kinds: list[Callable[[Tensor, Tensor], Any]] = []
        self._seed = seed
        if mixup or cutmix:
            from torchvision.transforms import v2  # takes a second to import

            kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            self._kinds = [kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, iters: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and each one's shares of the classes, (N, num_classes); or both as they are.

        Args:
            images_NCHW: float, before normalisation or after it.
            labels_N: int64.
            iters: completed iterations.
            micro_batch: its index, counted over all processes.
        """
        if not self._kinds:
            return images_NCHW, labels_N
        with seeded(derive_seed(self._seed, _STREAM, iters, micro_batch)):
            kind = self._kinds[int(torch.randint(len(self._kinds), ()))]
            images_NCHW, shares_NC = kind(images_NCHW, labels_N)
        return images_NCHW, shares_NC


def main_labels(targets: Tensor) -> Tensor:
    """Return the label of each image, (N,): that of its largest share."""
    return targets.argmax(1) if targets.is_floating_point() else targets
