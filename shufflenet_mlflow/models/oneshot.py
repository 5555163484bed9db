"""ShuffleNetOneShot: the network found by Single Path One-Shot search; Guo et al., 2019, arXiv:1904.00420.

Each of the 20 units has one of four branches (a ShuffleNetV2 branch with a 3x3, 5x5 or 7x7 kernel, or an Xception
branch) and a searched inner width; see `search_space`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from shufflenet_mlflow.models.blocks import (
    KERNELS,
    XCEPTION,
    ShuffleUnit,
    UnitSpec,
    classifier,
    conv_bn_act,
    initialise,
    unit_specs,
)
from shufflenet_mlflow.models.search_space import (
    CHOICES,
    SCALES,
    STAGE_UNITS,
    STAGE_WIDTHS,
    check_choices,
    check_scales,
    complete,
    inner_width,
)

FIRST_WIDTH = 16
LAST_WIDTH = 1024
DROPOUT = 0.1


def unit(spec: UnitSpec, choice: int, scale: float = 1.0) -> ShuffleUnit:
    """Return a unit with one of the four branches; arguments as for `ShuffleNetOneShot`."""
    return ShuffleUnit(
        spec.in_channels,
        spec.out_channels,
        mid_channels=inner_width(spec.out_channels, scale),
        kernel=KERNELS[choice],
        stride=spec.stride,
        xception=choice == XCEPTION,
    )


class ShuffleNetOneShot(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32.

    Args:
        choices: for each unit an index into `KERNELS` (3 is the Xception branch).
        scales: for each unit its inner width over half its width; above 0, at most `LARGEST_SCALE`.

    Raises:
        ModelError: there are not 20 of each, or one is outside the search space.
    """

    def __init__(self, num_classes: int, choices: Sequence[int] = CHOICES, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        check_choices(choices)
        check_scales(scales)

        self.first_conv = nn.Sequential(*conv_bn_act(3, FIRST_WIDTH, 3, stride=2))
        self.features = nn.Sequential(*map(unit, unit_specs(FIRST_WIDTH, STAGE_WIDTHS, STAGE_UNITS), choices, scales))
        self.conv_last = nn.Sequential(*conv_bn_act(STAGE_WIDTHS[-1], LAST_WIDTH, 1))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Sequential(classifier(LAST_WIDTH, num_classes, bias=False))
        initialise(self)

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        features: Tensor = self.conv_last(self.features(self.first_conv(x_NCHW)))
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NC = self.globalpool(self.forward_features(x_NCHW)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x_NC))
        return logits


def build(
    name: str, num_classes: int, choices: Sequence[int] | None = None, scales: Sequence[float] | None = None
) -> ShuffleNetOneShot:
    """Build the released network, or another of its search space, with random weights.

    Args:
        name: not used; all `build` functions take it.
        num_classes: width of the classifier.
        choices: as for `complete`.
        scales: as for `complete`.
    """
    return ShuffleNetOneShot(num_classes, *complete(choices, scales))
