"""torchvision's unit, in a module of its own because torchvision takes a second to import."""

import torch
from torch import Tensor
from torchvision.models.shufflenetv2 import InvertedResidual

from shufflenet_mlflow.models.shuffling import channel_shuffle


class Unit(InvertedResidual):
    """torchvision's unit with a channel shuffle that keeps the memory format; shapes, values and keys are equal."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        if self.stride == 1:
            kept, processed = x.chunk(2, dim=1)
        else:
            kept, processed = self.branch1(x), x
        return channel_shuffle(torch.cat((kept, self.branch2(processed)), 1), 2)
