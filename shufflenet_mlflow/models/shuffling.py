"""Channel shuffle and the even/odd split, with as few copies as PyTorch allows.

Both functions keep the memory format of their input. PyTorch's own gradients of these operations do not: for a
channels-last tensor they are contiguous, and every earlier layer then converts them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def split_even_odd(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return channels 0, 2, 4, … and channels 1, 3, 5, …: the V2 family's channel shuffle.

    (N, C, H, W) -> two of (N, C / 2, H, W); the first is a view.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x_NCHW.requires_grad):
        return x_NCHW[:, 0::2], x_NCHW[:, 1::2]
    halves: tuple[Tensor, Tensor] = _EvenOdd.apply(x_NCHW)
    return halves


class _EvenOdd(torch.autograd.Function):
    """The split with a gradient that is written into one tensor; autograd's would fill and add two."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        ctx.memory_format = memory_format_of(x_NCHW)
        # The odd half goes through convolutions, which would each make a dense copy.
        return x_NCHW[:, 0::2], x_NCHW[:, 1::2].contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, even_NCHW: Tensor, odd_NCHW: Tensor) -> Tensor:
        N, C, H, W = odd_NCHW.shape
        grad_NCHW = torch.empty(
            (N, 2 * C, H, W), dtype=odd_NCHW.dtype, device=odd_NCHW.device, memory_format=ctx.memory_format
        )
        grad_NCHW[:, 0::2] = even_NCHW
        grad_NCHW[:, 1::2] = odd_NCHW
        return grad_NCHW


def channel_shuffle(x_NCHW: Tensor, groups: int) -> Tensor:
    """Move channel i * C / groups + j to j * groups + i, as `nn.ChannelShuffle` does; (N, C, H, W) -> (N, C, H, W)."""
    if x_NCHW.device.type == "cpu" and not torch.compiler.is_compiling():
        return functional.channel_shuffle(x_NCHW, groups)  # keeps the memory format on the CPU only
    N, C, H, W = x_NCHW.shape
    if memory_format_of(x_NCHW) == torch.channels_last:
        x_NHWGc = x_NCHW.permute(0, 2, 3, 1).view(N, H, W, groups, C // groups)
        return x_NHWGc.transpose(3, 4).reshape(N, H, W, C).permute(0, 3, 1, 2)
    return x_NCHW.view(N, groups, C // groups, H, W).transpose(1, 2).reshape(N, C, H, W)


def memory_format_of(x_NCHW: Tensor) -> torch.memory_format:
    """Return `torch.channels_last` if a tensor has that format and no other, else `torch.contiguous_format`."""
    is_last = x_NCHW.is_contiguous(memory_format=torch.channels_last) and not x_NCHW.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
