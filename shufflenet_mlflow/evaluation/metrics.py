"""Counts of correct predictions, over all images and by class."""

import torch
from torch import Tensor


def count_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count the labels that are the highest logit, and those among the highest five.

    With fewer than five classes all labels are among them.

    Args:
        logits: (N, num_classes).
        labels: (N,) int64.

    Returns:
        Two scalar int64 tensors on the logits' device.
    """
    hits = _highest(logits).eq(labels.unsqueeze(1))
    return hits[:, :1].sum(), hits.sum()


def count_by_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Count by class what `count_correct` counts over all: images, correct ones, and predictions.

    Args:
        logits: (N, num_classes).
        labels: (N,) int64.

    Returns:
        int64 (3, num_classes) on the logits' device: images of the class, those predicted as it, and all images that
        are predicted as it.
    """
    predicted_N = _highest(logits)[:, 0]
    ones_N = torch.ones_like(labels)
    counts_C = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    return torch.stack(
        [
            counts_C.index_add(0, labels, ones_N),
            counts_C.index_add(0, labels, predicted_N.eq(labels).long()),
            counts_C.index_add(0, predicted_N, ones_N),
        ]
    )


def _highest(logits: Tensor) -> Tensor:
    """Return the labels of the five highest logits of each row, or of all if there are fewer."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices
