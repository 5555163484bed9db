"""The network found by Single Path One-Shot search: Guo et al., 2019, arXiv:1904.00420.

Choices and scales are those of the released network. Each of the 20 units has one of four branches (a
ShuffleNetV2 branch with a 3x3, 5x5 or 7x7 kernel, or an Xception branch) and a searched inner width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from shufflenet_mlflow.models.blocks import ShuffleUnit, conv_bn_relu, initialise

STAGE_UNITS = (4, 4, 8, 4)
STAGE_WIDTHS = (64, 160, 320, 640)
FIRST_WIDTH = 16
LAST_WIDTH = 1024
DROPOUT = 0.1

KERNELS = (3, 5, 7, 3)
XCEPTION = 3
"""The choice that means the Xception branch; the others index `KERNELS`."""
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)

CHOICES = (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)
SCALE_IDS = (6, 5, 3, 5, 2, 6, 3, 4, 2, 5, 7, 5, 4, 6, 7, 4, 4, 5, 4, 3)


class ShuffleNetOneShot(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32.

    Args:
        choices: per unit, an index into `KERNELS` (3 is the Xception branch).
        scale_ids: per unit, an index into `SCALES`.
    """

    def __init__(self, choices: Sequence[int], scale_ids: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*conv_bn_relu(3, FIRST_WIDTH, 3, stride=2))
        units: list[nn.Module] = []
        in_channels = FIRST_WIDTH
        searched = iter(zip(choices, scale_ids, strict=True))
        for width, repeats in zip(STAGE_WIDTHS, STAGE_UNITS, strict=True):
            for index in range(repeats):
                choice, scale_id = next(searched)
                units.append(
                    ShuffleUnit(
                        in_channels,
                        width,
                        mid_channels=int(width // 2 * SCALES[scale_id]),
                        kernel=KERNELS[choice],
                        stride=2 if index == 0 else 1,
                        xception=choice == XCEPTION,
                    )
                )
                in_channels = width
        self.features = nn.Sequential(*units)
        self.conv_last = nn.Sequential(*conv_bn_relu(in_channels, LAST_WIDTH, 1))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Sequential(nn.Linear(LAST_WIDTH, num_classes, bias=False))
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.conv_last(self.features(self.first_conv(x_NCHW)))
        x_NC = self.globalpool(x_NCHW).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x_NC))
        return logits


def build(name: str, num_classes: int) -> ShuffleNetOneShot:
    """The released network, freshly initialised; `name` is there for the table's sake."""
    return ShuffleNetOneShot(CHOICES, SCALE_IDS, num_classes)
