"""Shared parts of Large and ExLarge: auxiliary heads for training, and channel gates of linear layers."""

from torch import Tensor, nn

from shufflenet_mlflow.models.blocks import BN_EPS, named_conv_bn

_HEADS = ("predict_56", "predict_28", "predict_14")
"""Names of the auxiliary heads, on the outputs of the first three stages."""

Logits = Tensor | tuple[Tensor, ...]
"""(N, num_classes) logits; of a network with auxiliary heads in training mode the main logits, then the heads'."""

OUTPUTS_IN_TRAINING = 4
"""Logits that a network with auxiliary heads returns then."""


def stem(widths: tuple[int, ...], *, eps: float = BN_EPS) -> nn.Sequential:
    """Return 3x3 convolutions, the first with stride 2: (N, 3, H, W) -> (N, widths[-1], H / 2, W / 2)."""
    inputs = (3, *widths)
    return nn.Sequential(
        *(named_conv_bn(inputs[i], width, 3, stride=1 if i else 2, eps=eps) for i, width in enumerate(widths))
    )


def gate(x_NCHW: Tensor, block: nn.Module) -> Tensor:
    """Multiply each channel by its gate: `block`, (N, C) -> (N, C), of the channels' means."""
    gates_NC: Tensor = block(x_NCHW.mean((2, 3)))
    return x_NCHW * gates_NC[:, :, None, None]


class AuxiliaryHead(nn.Module):
    """A classifier on features from the middle of the network: (N, in_channels, H, W) -> (N, num_classes)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, *, eps: float = BN_EPS) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.conv = nn.Sequential(
            named_conv_bn(in_channels, channels, 1, eps=eps),
            named_conv_bn(channels, channels, 3, eps=eps),
        )
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NC = self.conv(self.pool(x_NCHW)).mean((2, 3))
        logits: Tensor = self.fc(x_NC)
        return logits


class DeeplySupervised(nn.Module):
    """Base class of both networks, whose constructors set its members.

    Shapes:
        (N, 3, H, W) float images -> (N, num_classes) logits; H and W multiples of 32. In training mode it returns
        four such logits: its own, then those of `predict_14`, `predict_28` and `predict_56`. Without classes, it has
        no auxiliary heads, and returns features (N, C).
    """

    first_conv: nn.Sequential
    maxpool: nn.MaxPool2d
    features: nn.Sequential
    """Four stages; the auxiliary heads take the outputs of the first three."""
    predict_56: AuxiliaryHead
    predict_28: AuxiliaryHead
    predict_14: AuxiliaryHead
    conv_last: nn.Module
    globalpool: nn.Module
    dropout: nn.Module
    fc: nn.Module

    def add_auxiliary_heads(self, channels: tuple[tuple[int, int], ...], num_classes: int, *, eps: float) -> None:
        """Add the auxiliary heads, unless there are no classes.

        Args:
            channels: of the input and within the head, for the first three stages.
        """
        if num_classes:
            for name, (in_channels, inner) in zip(_HEADS, channels, strict=True):
                self.add_module(name, AuxiliaryHead(in_channels, inner, num_classes, eps=eps))

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        return self._outputs(x_NCHW)[-1]

    def _outputs(self, x_NCHW: Tensor) -> list[Tensor]:
        """Return the outputs of all stages, that of the last as `forward_features` does."""
        x_NCHW = self.maxpool(self.first_conv(x_NCHW))
        outputs: list[Tensor] = []
        for stage in self.features:
            x_NCHW = stage(x_NCHW)
            outputs.append(x_NCHW)
        return [*outputs[:-1], self.conv_last(x_NCHW)]

    def forward(self, x_NCHW: Tensor) -> Logits:
        after1, after2, after3, last = self._outputs(x_NCHW)
        logits: Tensor = self.fc(self.dropout(self.globalpool(last).flatten(1)))
        if not (self.training and hasattr(self, _HEADS[0])):
            return logits
        return logits, self.predict_14(after3), self.predict_28(after2), self.predict_56(after1)
