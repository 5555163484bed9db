"""Pieces that several families of the series share.

Shape letters: N batch, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from shufflenet_mlflow.errors import ModelError


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A bias-free convolution with padding `kernel // 2`, followed by batch normalisation.

    Returns a list, so that the callers' `nn.Sequential` numbers its members as the original
    release does: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """`conv_bn` with a ReLU behind it."""
    return [
        *conv_bn(in_channels, out_channels, kernel, stride, groups),
        nn.ReLU(inplace=True),
    ]


def split_even_odd(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Channels 0, 2, 4, … and channels 1, 3, 5, …: this split is the family's channel shuffle.

    (N, C, H, W) -> two views of (N, C / 2, H, W).
    """
    return x_NCHW[:, 0::2], x_NCHW[:, 1::2]


def shuffle_branch(in_channels: int, mid_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    """The ShuffleNetV2 branch: 1x1, depthwise `kernel` x `kernel`, 1x1 (arXiv:1807.11164, fig. 3).

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """
    return nn.Sequential(
        *conv_bn_relu(in_channels, mid_channels, 1),
        *conv_bn(mid_channels, mid_channels, kernel, stride, groups=mid_channels),
        *conv_bn_relu(mid_channels, out_channels, 1),
    )


def xception_branch(in_channels: int, mid_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Three depthwise-separable 3x3 convolutions; only the first strides (arXiv:1904.00420, sec. 4).

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """
    return nn.Sequential(
        *conv_bn(in_channels, in_channels, 3, stride, groups=in_channels),
        *conv_bn_relu(in_channels, mid_channels, 1),
        *conv_bn(mid_channels, mid_channels, 3, groups=mid_channels),
        *conv_bn_relu(mid_channels, mid_channels, 1),
        *conv_bn(mid_channels, mid_channels, 3, groups=mid_channels),
        *conv_bn_relu(mid_channels, out_channels, 1),
    )


def projection(channels: int, kernel: int) -> nn.Sequential:
    """The shortcut of a unit that halves the image: (N, C, H, W) -> (N, C, H / 2, W / 2)."""
    return nn.Sequential(
        *conv_bn(channels, channels, kernel, stride=2, groups=channels),
        *conv_bn_relu(channels, channels, 1),
    )


class ShuffleUnit(nn.Module):
    """One unit of the V2 family.

    With stride 1, `in_channels` must equal `out_channels`: the even channels pass, the odd ones go
    through the branch. With stride 2 the whole input goes through the branch and the projection.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)

    Args:
        mid_channels: width inside the branch.
        kernel: 3, 5 or 7, of the depthwise convolution (the Xception branch always has 3).
        xception: use the Xception branch.

    Raises:
        ModelError: `in_channels` is not divisible by 4 (stride 1: it is split in two halves whose
            parity must continue into the next unit), or differs from `out_channels`.
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
    ) -> None:
        super().__init__()
        if stride == 1 and (in_channels != out_channels or in_channels % 4):
            raise ModelError(
                f"a stride-1 unit needs in_channels (={in_channels}) equal to out_channels "
                f"(={out_channels}) and divisible by 4"
            )
        branch_in = in_channels // 2 if stride == 1 else in_channels
        branch_out = out_channels - branch_in
        self.branch_main = (
            xception_branch(branch_in, mid_channels, branch_out, stride)
            if xception
            else shuffle_branch(branch_in, mid_channels, branch_out, kernel, stride)
        )
        self.branch_proj = projection(in_channels, kernel) if stride == 2 else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.branch_proj is None:
            kept, processed = split_even_odd(x_NCHW)
            return torch.cat((kept, self.branch_main(processed)), 1)
        return torch.cat((self.branch_proj(x_NCHW), self.branch_main(x_NCHW)), 1)


def initialise(model: nn.Module) -> None:
    """Draw the initial weights as the original release does (its networks' `_initialize_weights`).

    Convolutions whose path contains "first" are N(0, 0.01), the others N(0, 1 / fan-in per
    position), linear layers N(0, 0.01); batch normalisation starts at weight 1, bias 1e-4.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            std = 0.01 if "first" in name else 1.0 / module.weight.shape[1]
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
