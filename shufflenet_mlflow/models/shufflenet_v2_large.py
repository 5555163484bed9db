"""ShuffleNetV2.Large: the release's network of 140 million parameters.

Its units have V2's even/odd split, grouped 3x3 convolutions, a residual connection and a channel gate. In training,
three auxiliary heads classify the outputs of the first three stages.
"""

import string

import torch
from torch import Tensor, nn
from torch.nn import functional

from shufflenet_mlflow.models.auxiliary import DeeplySupervised, gate, stem
from shufflenet_mlflow.models.blocks import classifier, initialise, named, named_conv_bn
from shufflenet_mlflow.models.shuffling import split_even_odd

STAGE_UNITS = (10, 10, 23, 10)
STAGE_WIDTHS = (64, 128, 256, 512)
"""A quarter of each stage's output channels."""
GROUPS = 8
FIRST_WIDTHS = (64, 64, 128)
LAST_WIDTH = 1280
DROPOUT = 0.2
EPS = 1e-9
"""Epsilon of every batch normalisation."""


class LargeUnit(nn.Module):
    """(N, in_channels, H, W) -> (N, 4 * width, H / stride, W / stride).

    Args:
        is_first: the first unit of a stage; the others need `in_channels` equal to 4 * width.
    """

    proj: nn.Sequential | None
    down: nn.Sequential | None

    def __init__(self, in_channels: int, width: int, *, stride: int, is_first: bool) -> None:
        super().__init__()
        half, wide = in_channels // 2, 2 * width
        self.down = named_conv_bn(2 * wide, 2 * wide, 1, eps=EPS) if stride == 2 else None
        self.proj = named_conv_bn(half, wide, 3, stride, eps=EPS, activate=False) if is_first else None
        self.branch_main = nn.Sequential(
            named_conv_bn(half, wide, 1, eps=EPS),
            named_conv_bn(wide, wide, 3, stride, groups=GROUPS, eps=EPS),
            named_conv_bn(wide, wide, 1, eps=EPS, activate=False),
        )
        # The released files hold these layers twice: by themselves, and within the block.
        self.se_fc1 = nn.Linear(wide, wide)
        self.se_fc2 = nn.Linear(wide, wide)
        self.se_block = nn.Sequential(self.se_fc1, nn.ReLU(inplace=True), self.se_fc2, nn.Sigmoid())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        kept, processed = split_even_odd(x_NCHW)
        branch = gate(self.branch_main(processed), self.se_block)
        if self.proj is None:
            branch = branch + processed
        else:
            kept = self.proj(kept)
        out = functional.relu(torch.cat((kept, branch), 1))
        return out if self.down is None else self.down(out)


class ShuffleNetV2Large(DeeplySupervised):
    """(N, 3, H, W) float images -> (N, num_classes) logits; in training mode four of them, see `DeeplySupervised`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first_conv = stem(FIRST_WIDTHS, eps=EPS)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stages: list[nn.Module] = []
        in_channels = FIRST_WIDTHS[-1]
        for number, (width, repeats) in enumerate(zip(STAGE_WIDTHS, STAGE_UNITS, strict=True), start=2):
            units: dict[str, nn.Module] = {}
            for index, letter in enumerate(string.ascii_lowercase[:repeats]):
                stride = 2 if index == 0 and number > 2 else 1
                units[f"{number}{letter}"] = LargeUnit(in_channels, width, stride=stride, is_first=index == 0)
                in_channels = 4 * width
            stages.append(named(units))
        self.features = nn.Sequential(*stages)
        self.add_auxiliary_heads(tuple((4 * width, 4 * width) for width in STAGE_WIDTHS[:3]), num_classes, eps=EPS)
        self.conv_last = named_conv_bn(in_channels, LAST_WIDTH, 3, eps=EPS)
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(DROPOUT)
        self.fc = classifier(LAST_WIDTH, num_classes)
        initialise(self)


def build(name: str, num_classes: int) -> ShuffleNetV2Large:
    """Build the network with freshly drawn weights; `name` is not used."""
    return ShuffleNetV2Large(num_classes)
