"""ShuffleNetV1: Zhang et al., "ShuffleNet", 2017, arXiv:1707.01083, table 1.

The pointwise convolutions are grouped; a channel shuffle between them mixes the groups. The released networks use the
inverse of the shuffle in the paper's figure 1, and their classifier has no bias.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from shufflenet_mlflow.errors import ModelError
from shufflenet_mlflow.models.blocks import UnitSpec, classifier, conv_bn, conv_bn_act, initialise, unit_specs
from shufflenet_mlflow.models.shuffling import channel_shuffle

STAGE_UNITS = (4, 8, 4)

# name -> groups, and widths of first_conv and the three stages
VARIANTS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "shufflenet_v1_x0_5_g3": (3, (12, 120, 240, 480)),
    "shufflenet_v1_x1_0_g3": (3, (24, 240, 480, 960)),
    "shufflenet_v1_x1_5_g3": (3, (24, 360, 720, 1440)),
    "shufflenet_v1_x2_0_g3": (3, (48, 480, 960, 1920)),
    "shufflenet_v1_x0_5_g8": (8, (16, 192, 384, 768)),
    "shufflenet_v1_x1_0_g8": (8, (24, 384, 768, 1536)),
    "shufflenet_v1_x1_5_g8": (8, (24, 576, 1152, 2304)),
    "shufflenet_v1_x2_0_g8": (8, (48, 768, 1536, 3072)),
}


def _regroup(x_NCHW: Tensor, groups: int) -> Tensor:
    """Move channel i to (i % groups) * C / groups + i // groups: the inverse of `channel_shuffle(x_NCHW, groups)`."""
    return channel_shuffle(x_NCHW, x_NCHW.shape[1] // groups)


class GroupedUnit(nn.Module):
    """Grouped 1x1, shuffle inside, depthwise 3x3, grouped 1x1.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride). With stride 1 the branch is added to
        its input, with stride 2 it is concatenated to the average-pooled input.

    Args:
        groups: groups of both pointwise convolutions.
        first_groups: groups of the first one, if they differ.

    Raises:
        ModelError: a width cannot be divided into the groups, or a stride-1 unit would change the width.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, stride: int, first_groups: int | None = None
    ) -> None:
        super().__init__()
        mid = out_channels // 4
        added = out_channels - in_channels if stride == 2 else out_channels
        first_groups = first_groups or groups
        if stride == 1 and in_channels != out_channels:
            raise ModelError(
                f"a stride-1 unit needs in_channels (={in_channels}) equal to out_channels (={out_channels})",
                code="grouped-unit-channels",
            )
        if in_channels % first_groups or mid % groups or mid % first_groups or added % groups:
            raise ModelError(
                f"{in_channels} -> {out_channels} channels cannot be divided into {groups} groups",
                code="groups-indivisible",
            )
        self.groups = groups
        self.branch_main_1 = nn.Sequential(
            *conv_bn_act(in_channels, mid, 1, groups=first_groups),
            *conv_bn(mid, mid, 3, stride, groups=mid),
        )
        self.branch_main_2 = nn.Sequential(*conv_bn(mid, added, 1, groups=groups))
        self.branch_proj = nn.AvgPool2d(kernel_size=3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        branch = self.branch_main_2(_regroup(self.branch_main_1(x_NCHW), self.groups))
        if self.branch_proj is None:
            return functional.relu(x_NCHW + branch)
        return torch.cat((self.branch_proj(x_NCHW), functional.relu(branch)), 1)


class ShuffleNetV1(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32.

    Args:
        groups: groups of the pointwise convolutions except the network's first.
        widths: channels of `first_conv` and the three stages.
    """

    def __init__(self, groups: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        first, *stages = widths
        self.first_conv = nn.Sequential(*conv_bn_act(3, first, 3, stride=2))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        def unit(spec: UnitSpec) -> GroupedUnit:
            return GroupedUnit(
                spec.in_channels,
                spec.out_channels,
                groups=groups,
                stride=spec.stride,
                first_groups=1 if spec.stage == spec.index == 0 else None,
            )

        self.features = nn.Sequential(*map(unit, unit_specs(first, stages, STAGE_UNITS)))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(classifier(stages[-1], num_classes, bias=False))
        initialise(self)

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        features: Tensor = self.features(self.maxpool(self.first_conv(x_NCHW)))
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.globalpool(self.forward_features(x_NCHW)).flatten(1))
        return logits


def build(name: str, num_classes: int) -> ShuffleNetV1:
    """Build the variant `name` of `VARIANTS` with freshly drawn weights."""
    groups, widths = VARIANTS[name]
    return ShuffleNetV1(groups, widths, num_classes)
