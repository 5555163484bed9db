"""ShuffleNetV2: Ma et al., "ShuffleNet V2", 2018, arXiv:1807.11164, table 5.

Deviations of the released networks from the paper, kept here so that their weights fit: an even/odd split before the
branch instead of a channel shuffle after it, a classifier without bias, and in x2.0 dropout of 20 % before the
classifier.
"""

from torch import Tensor, nn

from shufflenet_mlflow.models.blocks import ShuffleUnit, UnitSpec, classifier, conv_bn_act, initialise, unit_specs

STAGE_UNITS = (4, 8, 4)

# name -> widths of first_conv, the three stages and conv_last
WIDTHS: dict[str, tuple[int, int, int, int, int]] = {
    "shufflenet_v2_x0_5": (24, 48, 96, 192, 1024),
    "shufflenet_v2_x1_0": (24, 116, 232, 464, 1024),
    "shufflenet_v2_x1_5": (24, 176, 352, 704, 1024),
    "shufflenet_v2_x2_0": (24, 244, 488, 976, 2048),
}

DROPOUT = {"shufflenet_v2_x2_0": 0.2}


def _unit(spec: UnitSpec) -> ShuffleUnit:
    return ShuffleUnit(
        spec.in_channels, spec.out_channels, mid_channels=spec.out_channels // 2, kernel=3, stride=spec.stride
    )


class ShuffleNetV2(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32.

    Args:
        widths: channels of `first_conv`, the three stages and `conv_last`.
        dropout: probability of dropping a feature before the classifier.
    """

    def __init__(self, widths: tuple[int, int, int, int, int], num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        first, *stages, last = widths
        self.first_conv = nn.Sequential(*conv_bn_act(3, first, 3, stride=2))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.features = nn.Sequential(*map(_unit, unit_specs(first, stages, STAGE_UNITS)))
        self.conv_last = nn.Sequential(*conv_bn_act(stages[-1], last, 1))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = nn.Sequential(classifier(last, num_classes, bias=False))
        initialise(self)

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        features: Tensor = self.conv_last(self.features(self.maxpool(self.first_conv(x_NCHW))))
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NC = self.globalpool(self.forward_features(x_NCHW)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x_NC))
        return logits


def build(name: str, num_classes: int) -> ShuffleNetV2:
    """Build the variant `name` of `WIDTHS` with freshly drawn weights."""
    return ShuffleNetV2(WIDTHS[name], num_classes, DROPOUT.get(name, 0.0))
