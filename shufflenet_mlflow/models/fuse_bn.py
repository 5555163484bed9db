"""Fusion of batch normalisation into the preceding convolutions, which halves memory traffic in evaluation."""

import copy
import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_bn(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in evaluation mode with fewer layers and, up to rounding, the same outputs.

    Each convolution that is followed by batch normalisation in an `nn.Sequential`, as in all networks of the series,
    is fused with it.
    """
    copied = copy.deepcopy(model).eval()
    for sequence in copied.modules():
        if isinstance(sequence, nn.Sequential):
            _fuse(sequence)
    return copied


def _fuse(sequence: nn.Sequential) -> None:
    names = list(sequence._modules)
    for first, second in itertools.pairwise(names):
        conv, bn = sequence._modules[first], sequence._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            sequence._modules[first] = fuse_conv_bn_eval(conv, bn)
            sequence._modules[second] = nn.Identity()
