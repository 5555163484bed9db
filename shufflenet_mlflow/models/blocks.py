"""Building blocks that several families of the series share.

Shape letters: N batch, C channels, H height, W width.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shufflenet_mlflow.errors import ModelError
from shufflenet_mlflow.models.shuffling import split_even_odd

BN_EPS = 1e-5

KERNELS = (3, 5, 7, 3)
"""Depthwise kernel of each branch that architecture search chooses from."""
XCEPTION = 3
"""Index of the Xception branch in `KERNELS`; the others are ShuffleNetV2 branches."""


def relu() -> nn.Module:
    """Return the activation of most networks of the series."""
    return nn.ReLU(inplace=True)


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a bias-free convolution with padding `kernel // 2`, and batch normalisation.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). They come as a list, so that the
    callers' `nn.Sequential` numbers its members as the original release does.
    """
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


def conv_bn_act(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] = relu,
) -> list[nn.Module]:
    """Return `conv_bn` followed by an activation."""
    return [*conv_bn(in_channels, out_channels, kernel, stride, groups), activation()]


def named_conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    bias: bool = False,
    eps: float = BN_EPS,
    activate: bool = True,
) -> nn.Sequential:
    """Return convolution, batch normalisation and ReLU under the names `conv`, `bn` and `relu`.

    These are the names in the release's later networks; shapes as for `conv_bn`.

    Args:
        activate: append the ReLU.
    """
    members: dict[str, nn.Module] = {
        "conv": nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias),
        "bn": nn.BatchNorm2d(out_channels, eps=eps),
    }
    if activate:
        members["relu"] = relu()
    return named(members)


def named(members: dict[str, nn.Module]) -> nn.Sequential:
    """Return an `nn.Sequential` whose members have names instead of numbers."""
    return nn.Sequential(OrderedDict(members))


def classifier(in_features: int, num_classes: int, *, bias: bool = True) -> nn.Module:
    """Return the last layer, (N, in_features) -> (N, num_classes); with 0 classes, one that returns its input."""
    return nn.Linear(in_features, num_classes, bias=bias) if num_classes else nn.Identity()


@dataclass(frozen=True)
class UnitSpec:
    """Position and widths of a unit, in a network whose stages begin with a unit of stride 2."""

    stage: int
    """Index of the stage."""
    index: int
    """Index within the stage."""
    in_channels: int
    out_channels: int

    @property
    def stride(self) -> int:
        """2 for the first unit of a stage."""
        return 1 if self.index else 2


def unit_specs(in_channels: int, widths: Sequence[int], repeats: Sequence[int]) -> Iterator[UnitSpec]:
    """Yield the specs of the units of consecutive stages, in order.

    Args:
        in_channels: input channels of the first stage.
        widths: output channels of each stage.
        repeats: number of units in each stage.
    """
    for stage, (width, count) in enumerate(zip(widths, repeats, strict=True)):
        for index in range(count):
            yield UnitSpec(stage, index, in_channels, width)
            in_channels = width


def shuffle_branch(
    in_channels: int,
    mid_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    activation: Callable[[], nn.Module] = relu,
) -> nn.Sequential:
    """Return the ShuffleNetV2 branch: 1x1, depthwise `kernel` x `kernel`, 1x1 (arXiv:1807.11164, fig. 3).

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """
    return nn.Sequential(
        *conv_bn_act(in_channels, mid_channels, 1, activation=activation),
        *conv_bn(mid_channels, mid_channels, kernel, stride, groups=mid_channels),
        *conv_bn_act(mid_channels, out_channels, 1, activation=activation),
    )


def xception_branch(
    in_channels: int,
    mid_channels: int,
    out_channels: int,
    stride: int,
    activation: Callable[[], nn.Module] = relu,
) -> nn.Sequential:
    """Return three depthwise-separable 3x3 convolutions, the first with `stride` (arXiv:1904.00420, sec. 4).

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """
    return nn.Sequential(
        *conv_bn(in_channels, in_channels, 3, stride, groups=in_channels),
        *conv_bn_act(in_channels, mid_channels, 1, activation=activation),
        *conv_bn(mid_channels, mid_channels, 3, groups=mid_channels),
        *conv_bn_act(mid_channels, mid_channels, 1, activation=activation),
        *conv_bn(mid_channels, mid_channels, 3, groups=mid_channels),
        *conv_bn_act(mid_channels, out_channels, 1, activation=activation),
    )


def projection(channels: int, kernel: int, activation: Callable[[], nn.Module] = relu) -> nn.Sequential:
    """Return the shortcut of a unit of stride 2: (N, C, H, W) -> (N, C, H / 2, W / 2)."""
    return nn.Sequential(
        *conv_bn(channels, channels, kernel, stride=2, groups=channels),
        *conv_bn_act(channels, channels, 1, activation=activation),
    )


def require_splittable(in_channels: int, out_channels: int) -> None:
    """Check the widths of a unit of stride 1, which passes half of its channels through.

    Raises:
        ModelError: they differ, or are not divisible by 4: each half must itself split into even and odd channels in
            the next unit.
    """
    if in_channels != out_channels or in_channels % 4:
        raise ModelError(
            f"a stride-1 unit needs in_channels (={in_channels}) equal to out_channels "
            f"(={out_channels}) and divisible by 4",
            code="unit-channels",
        )


class ShuffleUnit(nn.Module):
    """One unit of V2, V2+ and OneShot.

    With stride 1 the even channels pass through, and the odd ones go through the branch. With stride 2 all channels go
    through both the branch and the projection.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)

    Args:
        mid_channels: width inside the branch.
        kernel: of the depthwise convolution: 3, 5 or 7 (the Xception branch always has 3).
        xception: use the Xception branch.
        activation: makes an activation.
        squeeze: makes a gate of C channels for the branch's output, (N, C, H, W) -> (N, C, H, W).

    Raises:
        ModelError: the widths do not suit a unit of stride 1; see `require_splittable`.
    """

    branch_proj: nn.Sequential | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mid_channels: int,
        kernel: int,
        stride: int,
        xception: bool = False,
        activation: Callable[[], nn.Module] = relu,
        squeeze: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if stride == 1:
            require_splittable(in_channels, out_channels)
        branch_in = in_channels // 2 if stride == 1 else in_channels
        branch_out = out_channels - branch_in
        self.branch_main = (
            xception_branch(branch_in, mid_channels, branch_out, stride, activation)
            if xception
            else shuffle_branch(branch_in, mid_channels, branch_out, kernel, stride, activation)
        )
        if squeeze is not None:
            self.branch_main.append(squeeze(branch_out))
        self.branch_proj = projection(in_channels, kernel, activation) if stride == 2 else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.branch_proj is None:
            kept, processed = split_even_odd(x_NCHW)
            return torch.cat((kept, self.branch_main(processed)), 1)
        return torch.cat((self.branch_proj(x_NCHW), self.branch_main(x_NCHW)), 1)


def initialise(model: nn.Module, *, small: tuple[str, ...] = ("first",)) -> None:
    """Draw the initial weights as the original release does (its networks' `_initialize_weights`).

    Weights of convolutions have mean 0 and standard deviation 1 / weight.shape[1], those of linear layers 0.01; biases
    are 0. Batch normalisation starts at weight 1, bias 1e-4.

    Args:
        small: convolutions whose names contain one of these words have standard deviation 0.01 instead.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # nothing to draw; PyTorch would import its compiler for it, which takes 2 s
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            std = 0.01 if any(word in name for word in small) else 1 / module.weight.shape[1]
            nn.init.normal_(module.weight, 0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, 1e-4)
            nn.init.zeros_(module.running_mean)  # type: ignore[arg-type]  # always tracked here
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
