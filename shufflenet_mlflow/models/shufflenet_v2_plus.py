"""ShuffleNetV2+: V2 with OneShot's searched branches, hard swish and squeeze-and-excitation (SE).

It has no paper; the source is the release's `ShuffleNetV2+` folder.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shufflenet_mlflow.models.blocks import (
    KERNELS,
    XCEPTION,
    ShuffleUnit,
    UnitSpec,
    classifier,
    conv_bn_act,
    initialise,
    relu,
    unit_specs,
)
from shufflenet_mlflow.models.search_space import CHOICES, STAGE_UNITS

LAST_WIDTH = 1280
DROPOUT = 0.2
HARD_SWISH_FROM = 1
"""Index of the first stage whose units have hard swish instead of ReLU."""
SQUEEZE_FROM = 2
"""Index of the first stage whose branches end in SE."""

# name -> widths of first_conv and the four stages
WIDTHS: dict[str, tuple[int, int, int, int, int]] = {
    "shufflenet_v2_plus_small": (16, 36, 104, 208, 416),
    "shufflenet_v2_plus_medium": (16, 48, 128, 256, 512),
    "shufflenet_v2_plus_large": (16, 68, 168, 336, 672),
}


class SqueezeExcite(nn.Module):
    """(N, C, H, W) -> (N, C, H, W): each channel times a gate in 0..1 computed from all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.SE_opr = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *conv_bn_act(channels, channels // 4, 1),
            nn.Conv2d(channels // 4, channels, 1, bias=False),
            nn.Hardsigmoid(),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        gated: Tensor = x_NCHW * self.SE_opr(x_NCHW)
        return gated


def _unit(spec: UnitSpec, choice: int) -> ShuffleUnit:
    activation: Callable[[], nn.Module] = nn.Hardswish if spec.stage >= HARD_SWISH_FROM else relu
    return ShuffleUnit(
        spec.in_channels,
        spec.out_channels,
        mid_channels=spec.out_channels // 2,
        kernel=KERNELS[choice],
        stride=spec.stride,
        xception=choice == XCEPTION,
        activation=activation,
        squeeze=SqueezeExcite if spec.stage >= SQUEEZE_FROM else None,
    )


class ShuffleNetV2Plus(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32.

    Args:
        widths: channels of `first_conv` and the four stages.
    """

    def __init__(self, widths: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        first, *stages = widths
        self.first_conv = nn.Sequential(*conv_bn_act(3, first, 3, stride=2, activation=nn.Hardswish))
        self.features = nn.Sequential(*map(_unit, unit_specs(first, stages, STAGE_UNITS), CHOICES))
        self.conv_last = nn.Sequential(*conv_bn_act(stages[-1], LAST_WIDTH, 1, activation=nn.Hardswish))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.LastSE = SqueezeExcite(LAST_WIDTH)
        self.fc = nn.Sequential(nn.Linear(LAST_WIDTH, LAST_WIDTH, bias=False), nn.Hardswish())
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Sequential(classifier(LAST_WIDTH, num_classes, bias=False))
        initialise(self, small=("first", "SE"))

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        features: Tensor = self.conv_last(self.features(self.first_conv(x_NCHW)))
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NC = torch.flatten(self.LastSE(self.globalpool(self.forward_features(x_NCHW))), 1)
        logits: Tensor = self.classifier(self.dropout(self.fc(x_NC)))
        return logits


def build(name: str, num_classes: int) -> ShuffleNetV2Plus:
    """Build the variant `name` of `WIDTHS` with freshly drawn weights."""
    return ShuffleNetV2Plus(WIDTHS[name], num_classes)
