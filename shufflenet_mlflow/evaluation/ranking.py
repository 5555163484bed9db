"""The most probable labels from a network's logits.

Logged models carry a copy of this module (`export.bundle`), so it imports nothing of the package.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Ranked = list[tuple[str, float]]
"""Labels with their probabilities, the most probable first."""


def rank(logits_NC: Tensor, labels: Sequence[str], top: int = 1) -> list[Ranked]:
    """Return the `top` most probable labels of each row of `logits_NC`; equal ones in the order of `labels`."""
    probabilities_NC = torch.softmax(logits_NC.float(), 1).cpu()
    order_NC = torch.argsort(probabilities_NC, dim=1, descending=True, stable=True)[:, :top]
    rows = zip(order_NC.tolist(), probabilities_NC.gather(1, order_NC).tolist(), strict=True)
    return [[(labels[index], value) for index, value in zip(*row, strict=True)] for row in rows]
