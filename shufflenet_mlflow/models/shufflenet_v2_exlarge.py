"""ShuffleNetV2.ExLarge: the release's network of 271 million parameters.

Its units have V2's even/odd split, grouped and depthwise 3x3 convolutions, a residual connection and a channel gate. In
training, three auxiliary heads classify the outputs of the first three stages.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from shufflenet_mlflow.models.auxiliary import DeeplySupervised, gate, stem
from shufflenet_mlflow.models.blocks import BN_EPS, classifier, initialise, named, named_conv_bn
from shufflenet_mlflow.models.shuffling import split_even_odd

STAGE_UNITS = (8, 16, 36, 10)
STAGE_WIDTHS = (320, 640, 1280, 2560)
HEAD_WIDTHS = (256, 512, 1024)
GROUPS = 16
SQUEEZE = 4
"""Channels of a gate's input over those of its inner layer."""
FIRST_WIDTHS = (64, 128, 256)
DROPOUT = 0.2


class ExLargeUnit(nn.Module):
    """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).

    Args:
        is_first: the first unit of a stage; the others need `in_channels` equal to `out_channels`.
    """

    proj: nn.Sequential | None

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, is_first: bool) -> None:
        super().__init__()
        half = out_channels // 2
        branch_in = in_channels if is_first else in_channels // 2
        self.proj = named_conv_bn(in_channels, out_channels - half, 3, stride) if is_first else None
        self.branch_main = nn.Sequential(
            named_conv_bn(branch_in, out_channels, 1),
            named_conv_bn(out_channels, out_channels, 3, stride, groups=GROUPS),
            named_conv_bn(out_channels, out_channels, 3, groups=out_channels, activate=False),
            named_conv_bn(out_channels, half, 1, activate=False),
        )
        # The released files hold these layers twice: by themselves, and within the block.
        self.se_fc1 = named({"fc": nn.Linear(half, half // SQUEEZE)})
        self.se_fc2 = named({"fc": nn.Linear(half // SQUEEZE, half)})
        self.se_block = nn.Sequential(self.se_fc1, nn.ReLU(inplace=True), self.se_fc2, nn.Sigmoid())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.proj is not None:
            return torch.cat((self.proj(x_NCHW), gate(self.branch_main(x_NCHW), self.se_block)), 1)
        kept, processed = split_even_odd(x_NCHW)
        branch = functional.relu(processed + gate(self.branch_main(processed), self.se_block))
        return torch.cat((kept, branch), 1)


class ShuffleNetV2ExLarge(DeeplySupervised):
    """(N, 3, H, W) float images -> (N, num_classes) logits; in training mode four of them, see `DeeplySupervised`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first_conv = stem(FIRST_WIDTHS)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stages: list[nn.Module] = []
        in_channels = FIRST_WIDTHS[-1]
        for number, (width, repeats) in enumerate(zip(STAGE_WIDTHS, STAGE_UNITS, strict=True)):
            units: list[nn.Module] = []
            for index in range(repeats):
                stride = 2 if index == 0 and number > 0 else 1
                units.append(ExLargeUnit(in_channels, width, stride=stride, is_first=index == 0))
                in_channels = width
            stages.append(nn.Sequential(*units, named_conv_bn(width, width, 1)))
        self.features = nn.Sequential(*stages)
        self.add_auxiliary_heads(tuple(zip(STAGE_WIDTHS[:3], HEAD_WIDTHS, strict=True)), num_classes, eps=BN_EPS)
        self.conv_last = nn.Identity()
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(DROPOUT)
        self.fc = named({"fc": classifier(in_channels, num_classes)})
        initialise(self)


def build(name: str, num_classes: int) -> ShuffleNetV2ExLarge:
    """Build the network with freshly drawn weights; `name` is not used."""
    return ShuffleNetV2ExLarge(num_classes)
