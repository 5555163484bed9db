"""ShuffleNetOneShot: the network found by Single Path One-Shot search; Guo et al., 2019, arXiv:1904.00420.

Each of the 20 units has one of four branches (a ShuffleNetV2 branch with a 3x3, 5x5 or 7x7 kernel, or an Xception
branch) and a searched inner width. Choices and scales are those of the released network unless others are given.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from shufflenet_mlflow.errors import ModelError
from shufflenet_mlflow.models.blocks import (
    KERNELS,
    XCEPTION,
    ShuffleUnit,
    UnitSpec,
    conv_bn_act,
    initialise,
    unit_specs,
)

STAGE_UNITS = (4, 4, 8, 4)
UNITS = sum(STAGE_UNITS)
STAGE_WIDTHS = (64, 160, 320, 640)
FIRST_WIDTH = 16
LAST_WIDTH = 1024
DROPOUT = 0.1

LARGEST_SCALE = 2.0
"""The search space ends at 1.6; a larger number is probably an index into it instead of a scale."""

CHOICES = (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)
SCALES = (1.4, 1.2, 0.8, 1.2, 0.6, 1.4, 0.8, 1.0, 0.6, 1.2, 1.6, 1.2, 1.0, 1.4, 1.6, 1.0, 1.0, 1.2, 1.0, 0.8)


class ShuffleNetOneShot(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32.

    Args:
        choices: for each unit an index into `KERNELS` (3 is the Xception branch).
        scales: for each unit its inner width over half its width; above 0, at most `LARGEST_SCALE`.

    Raises:
        ModelError: there are not 20 of each, or one is out of range.
    """

    def __init__(self, num_classes: int, choices: Sequence[int] = CHOICES, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        check_choices(choices)
        check_scales(scales)

        def unit(spec: UnitSpec, choice: int, scale: float) -> ShuffleUnit:
            return ShuffleUnit(
                spec.in_channels,
                spec.out_channels,
                mid_channels=int(spec.out_channels // 2 * scale),
                kernel=KERNELS[choice],
                stride=spec.stride,
                xception=choice == XCEPTION,
            )

        self.first_conv = nn.Sequential(*conv_bn_act(3, FIRST_WIDTH, 3, stride=2))
        self.features = nn.Sequential(*map(unit, unit_specs(FIRST_WIDTH, STAGE_WIDTHS, STAGE_UNITS), choices, scales))
        self.conv_last = nn.Sequential(*conv_bn_act(STAGE_WIDTHS[-1], LAST_WIDTH, 1))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Sequential(nn.Linear(LAST_WIDTH, num_classes, bias=False))
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.conv_last(self.features(self.first_conv(x_NCHW)))
        x_NC = self.globalpool(x_NCHW).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x_NC))
        return logits


def check_choices(choices: Sequence[int]) -> None:
    """Raise ModelError unless `choices` holds 20 integers of 0..3."""
    if len(choices) != UNITS:
        raise ModelError(f"choices: there are {len(choices)}, not {UNITS}, one per unit", code="choices-count")
    for choice in choices:
        if type(choice) is not int or choice not in range(len(KERNELS)):
            raise ModelError(
                f"choices: {choice!r} is none of 0, 1, 2 (kernels 3, 5, 7) and 3 (Xception)", code="choices-value"
            )


def check_scales(scales: Sequence[float]) -> None:
    """Raise ModelError unless `scales` holds 20 factors up to `LARGEST_SCALE` that leave each unit a channel."""
    if len(scales) != UNITS:
        raise ModelError(f"scales: there are {len(scales)}, not {UNITS}, one per unit", code="scales-count")
    narrowest = STAGE_WIDTHS[0] // 2
    for scale in scales:
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not 1 / narrowest <= scale <= LARGEST_SCALE:
            raise ModelError(
                f"scales: {scale!r} is not a factor of {1 / narrowest} to {LARGEST_SCALE}; the search space has "
                "0.2, 0.4 … 1.6 (the factors themselves, not their indices)",
                code="scales-value",
            )


def complete(
    choices: Sequence[int] | None, scales: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return choices and scales with defaults filled in: the published ones, or scales of 1 if choices are given.

    Raises:
        ModelError: there are not 20 of each, or one is out of range.
    """
    if scales is None:
        scales = SCALES if choices is None else (1.0,) * UNITS
    choices = CHOICES if choices is None else choices
    check_choices(choices)
    check_scales(scales)
    return tuple(choices), tuple(map(float, scales))


def build(
    name: str, num_classes: int, choices: Sequence[int] | None = None, scales: Sequence[float] | None = None
) -> ShuffleNetOneShot:
    """Build the released network, or another of its search space, with freshly drawn weights.

    Args:
        name: not used; all `build` functions take it.
        num_classes: width of the classifier.
        choices: as for `complete`.
        scales: as for `complete`.
    """
    return ShuffleNetOneShot(num_classes, *complete(choices, scales))
