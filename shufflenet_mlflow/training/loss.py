"""The loss of training: label smoothing, auxiliary heads, weights of classes, soft targets."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

AUXILIARY_WEIGHTS = (1.0, 0.7, 0.5, 0.3)
"""Weights of the losses on the main logits and on those of `predict_14`, `predict_28` and `predict_56`."""


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which each image counts as much as its class; for labels, and for shares of classes.

    PyTorch's own would also weight the classes over which a label is smoothed, and divide by the sum of the weights,
    which depends on the micro-batch.

    Args:
        weights_C: float (num_classes,), the weight of each class.
        label_smooth: share of the target that is spread evenly over all classes.
    """

    def __init__(self, weights_C: Tensor, label_smooth: float) -> None:
        super().__init__()
        self.weights_C, self.label_smooth = weights_C, label_smooth

    def forward(self, logits_NC: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; targets are (N,) int64 labels or (N, num_classes) float shares."""
        weights_N = targets @ self.weights_C if targets.is_floating_point() else self.weights_C[targets]
        losses_N = functional.cross_entropy(logits_NC, targets, reduction="none", label_smoothing=self.label_smooth)
        return (weights_N * losses_N).mean()


def class_weights(labels: NDArray[np.int32], num_classes: int) -> Tensor:
    """Return weights that make all classes count equally, (num_classes,) float32; their mean over the images is 1."""
    counts = torch.from_numpy(np.bincount(labels, minlength=num_classes))
    present = counts > 0
    weights = len(labels) / (present.sum() * counts.clamp(min=1)).double()
    return torch.where(present, weights, 1.0).float()


def make_loss(label_smooth: float = 0.0, weights_C: Tensor | None = None) -> nn.Module:
    """Return the cross-entropy loss; `label_smooth` of the target is spread evenly over all classes.

    Args:
        weights_C: the weight of each class, if they differ.
    """
    if weights_C is not None:
        return WeightedCrossEntropy(weights_C, label_smooth)
    return nn.CrossEntropyLoss(label_smoothing=label_smooth)


def training_loss(
    outputs: Tensor | tuple[Tensor, ...], targets: Tensor, loss_function: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise, and the main logits.

    Args:
        outputs: of the network in training mode: (N, num_classes) logits, or four such, the main ones first, then
            those of the auxiliary heads; their losses are added with `AUXILIARY_WEIGHTS`.
        targets: (N,) int64 labels, or (N, num_classes) float shares of classes.
    """
    if isinstance(outputs, Tensor):
        return loss_function(outputs, targets), outputs
    pairs = zip(AUXILIARY_WEIGHTS, outputs, strict=True)
    losses = [weight * loss_function(logits, targets) for weight, logits in pairs]
    return torch.stack(losses).sum(), outputs[0]
