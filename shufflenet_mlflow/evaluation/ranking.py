"""Labels with their probabilities.

Logged models carry a copy of this file (`export.bundle`): nothing of the package is imported.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Ranked = list[tuple[str, float]]
"""Labels with their probabilities, the most probable first."""


def rank(logits_NC: Tensor, labels: Sequence[str], top: int = 1) -> list[Ranked]:
    """The `top` most probable labels of each row; of equal ones the first."""
    probabilities_NC = torch.softmax(logits_NC.float(), 1).cpu()
    order_NC = torch.argsort(probabilities_NC, dim=1, descending=True, stable=True)[:, :top]
    rows = zip(order_NC.tolist(), probabilities_NC.gather(1, order_NC).tolist(), strict=True)
    return [[(labels[index], value) for index, value in zip(*row, strict=True)] for row in rows]
