"""Counts of right answers."""

from torch import Tensor


def count_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels are among the highest one, and the highest five, logits.

    With fewer than five classes the second counts all of them.

    Args:
        logits: (N, num_classes).
        labels: (N,) int64.

    Returns:
        Two scalar int64 tensors on the logits' device.
    """
    k = min(5, logits.shape[1])
    hits = logits.topk(k, dim=1).indices.eq(labels.unsqueeze(1))
    return hits[:, :1].sum(), hits.sum()
