"""torchvision's unit, kept apart because torchvision takes a second to import: only its own networks need that."""

import torch
from torch import Tensor
from torchvision.models.shufflenetv2 import InvertedResidual

from shufflenet_mlflow.models.shuffling import channel_shuffle


class Unit(InvertedResidual):
    """But for the shuffle, which keeps the memory format here: same shapes, values and keys."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        if self.stride == 1:
            kept, processed = x.chunk(2, dim=1)
        else:
            kept, processed = self.branch1(x), x
        return channel_shuffle(torch.cat((kept, self.branch2(processed)), 1), 2)
