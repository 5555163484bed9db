"""Counts of top-1 and top-5 correct predictions."""

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
    k = min(5, logits.shape[1])
    hits = logits.topk(k, dim=1).indices.eq(labels.unsqueeze(1))
    return hits[:, :1].sum(), hits.sum()
