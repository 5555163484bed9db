"""Batch normalisation whose statistics no longer change."""

from torch import Tensor, nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that stays in evaluation mode: it normalises with its statistics, which never change."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode."""
        return super().train(mode=False)


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """Batch normalisation that the convolution before it computes: it returns its input."""

    def forward(self, input: Tensor) -> Tensor:
        return input
