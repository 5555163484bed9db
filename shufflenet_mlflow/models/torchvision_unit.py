"""torchvision's network and unit, in a module of their own because torchvision takes a second to import."""

import torch
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual, ShuffleNetV2

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


class Network(ShuffleNetV2):
    """torchvision's network of these units: (N, 3, H, W) float images -> (N, num_classes) logits.

    Args:
        widths: channels of `conv1`, the three stages and `conv5`.
    """

    def __init__(self, stage_units: tuple[int, ...], widths: tuple[int, ...], num_classes: int) -> None:
        super().__init__([*stage_units], [*widths], num_classes or 1, inverted_residual=Unit)
        if not num_classes:
            self.fc = nn.Identity()  # type: ignore[assignment]

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        x_NCHW = self.stage2(self.maxpool(self.conv1(x_NCHW)))
        features: Tensor = self.conv5(self.stage4(self.stage3(x_NCHW)))
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.forward_features(x_NCHW).mean([2, 3]))
        return logits
