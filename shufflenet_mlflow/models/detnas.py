"""DetNAS: backbones searched for object detectors; Chen et al., 2019, arXiv:1903.10979.

The units are OneShot's without searched widths, with one difference in activations: none after the last convolution of
a branch, but one after the whole branch. Members keep the names of the released files.
"""

import string
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shufflenet_mlflow.models.blocks import (
    KERNELS,
    XCEPTION,
    UnitSpec,
    classifier,
    initialise,
    named,
    named_conv_bn,
    relu,
    require_splittable,
    unit_specs,
)
from shufflenet_mlflow.models.shuffling import split_even_odd

DROPOUT = 0.2


@dataclass(frozen=True)
class Backbone:
    """One searched network."""

    choices: tuple[int, ...]
    """For each unit an index into `KERNELS` (3 is the Xception branch)."""
    units: tuple[int, int, int, int] = (4, 4, 8, 4)
    """Number of units in each stage."""
    first: int = 16
    """Channels of `first_conv`."""
    widths: tuple[int, int, int, int] = (64, 160, 320, 640)
    """Channels of each stage."""
    last: int = 1024
    """Channels of `last_conv`."""


def _digits(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


_COCO_FPN_LARGE = _digits("0 0 3 1 2 1 0 2 0 3 1 2 3 3 2 0 2 1 1 3 2 0 2 2 2 1 3 1 0 3 3 3 1 3 3 3 3 3 3 3")

BACKBONES: dict[str, Backbone] = {
    "detnas_voc_retinanet_300m": Backbone(_digits("1 3 0 0 2 3 3 3 2 3 3 3 3 2 2 0 2 3 1 1")),
    "detnas_voc_fpn_300m": Backbone(_digits("2 1 0 3 1 3 0 3 2 0 1 1 3 3 3 3 3 3 3 1")),
    "detnas_coco_retinanet_300m": Backbone(_digits("2 3 1 1 3 2 1 3 3 1 1 1 3 3 2 0 3 3 3 3")),
    "detnas_coco_fpn_300m": Backbone(_digits("2 1 2 0 2 1 1 2 3 3 1 3 0 0 3 1 3 1 3 2")),
    "detnas_coco_fpn_1_3g": Backbone(_COCO_FPN_LARGE, (8, 8, 16, 8), 48, (96, 240, 480, 960), 1024),
    "detnas_coco_fpn_3_8g": Backbone(_COCO_FPN_LARGE, (8, 8, 16, 8), 72, (172, 432, 864, 1728), 1728),
}


def _pointwise(name: str, in_channels: int, out_channels: int) -> dict[str, nn.Module]:
    return {
        f"interstellar{name}": nn.Conv2d(in_channels, out_channels, 1, bias=False),
        f"bn{name}": nn.BatchNorm2d(out_channels),
    }


def _separable(name: str, in_channels: int, out_channels: int, kernel: int, stride: int) -> dict[str, nn.Module]:
    """Return depthwise `kernel` x `kernel`, then 1x1, each with batch normalisation."""
    depthwise = nn.Conv2d(in_channels, in_channels, kernel, stride, kernel // 2, groups=in_channels, bias=False)
    return {
        f"interstellar{name}_s": depthwise,
        f"interstellar{name}_s_bn": nn.BatchNorm2d(in_channels),
        **_pointwise(name, in_channels, out_channels),
    }


class DetNASUnit(nn.Module):
    """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).

    Args:
        name: in the released files: the stage's number and a letter, such as `2c`.
        choice: an index into `KERNELS` (3 is the Xception branch).

    Raises:
        ModelError: the widths do not suit a unit of stride 1; see `require_splittable`.
    """

    proj_conv: nn.Sequential | None

    def __init__(self, name: str, in_channels: int, out_channels: int, *, choice: int, stride: int) -> None:
        super().__init__()
        if stride == 1:
            require_splittable(in_channels, out_channels)
        kernel = KERNELS[choice]
        branch_in = in_channels // 2 if stride == 1 else in_channels
        branch_out = out_channels - branch_in
        mid = out_channels // 2
        if choice == XCEPTION:
            prefix = f"{name}_xception_3x3_branch2"
            self.conv = nn.Sequential(
                named({**_separable(f"{prefix}a", branch_in, mid, 3, stride), "relu": relu()}),
                named({**_separable(f"{prefix}b", mid, mid, 3, 1), "relu": relu()}),
                named(_separable(f"{prefix}c", mid, branch_out, 3, 1)),
            )
        else:
            prefix = f"{name}_shufflenet_{kernel}x{kernel}_branch2"
            self.conv = nn.Sequential(
                named({**_pointwise(f"{prefix}a", branch_in, mid), "relu": relu()}),
                named(_separable(f"{prefix}b", mid, branch_out, kernel, stride)),
            )
        self.proj_conv = (
            named({**_separable(f"{name}_proj", in_channels, in_channels, kernel, stride), "relu": relu()})
            if stride == 2
            else None
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.proj_conv is None:
            kept, processed = split_even_odd(x_NCHW)
        else:
            kept, processed = self.proj_conv(x_NCHW), x_NCHW
        return torch.cat((kept, functional.relu(self.conv(processed))), 1)


class DetNAS(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()

        def unit(spec: UnitSpec, choice: int) -> DetNASUnit:
            name = f"{spec.stage + 1}{string.ascii_lowercase[spec.index]}"
            return DetNASUnit(name, spec.in_channels, spec.out_channels, choice=choice, stride=spec.stride)

        specs = unit_specs(backbone.first, backbone.widths, backbone.units)
        self.first_conv = named_conv_bn(3, backbone.first, 3, stride=2, bias=True)
        self.features = nn.Sequential(*(unit(*pair) for pair in zip(specs, backbone.choices, strict=True)))
        self.last_conv = named_conv_bn(backbone.widths[-1], backbone.last, 1, bias=True)
        self.drop_out = nn.Dropout2d(DROPOUT)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = named({"fc": classifier(backbone.last, num_classes)})
        initialise(self)

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        features: Tensor = self.last_conv(self.features(self.first_conv(x_NCHW)))
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.drop_out(self.forward_features(x_NCHW))
        logits: Tensor = self.fc(self.global_pool(x_NCHW).flatten(1))
        return logits


def build(name: str, num_classes: int) -> DetNAS:
    """Build the variant `name` of `BACKBONES` with freshly drawn weights."""
    return DetNAS(BACKBONES[name], num_classes)
