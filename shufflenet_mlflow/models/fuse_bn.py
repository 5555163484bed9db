"""Fusion of batch normalisation into the preceding convolutions, which halves memory traffic in evaluation."""

import copy
import itertools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shufflenet_mlflow.models.batchnorm import FoldedBatchNorm2d
from shufflenet_mlflow.models.fake_quantize import layers_of


def fuse_bn(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in evaluation mode with fewer layers and, up to rounding, the same outputs.

    Each convolution that is followed by batch normalisation in an `nn.Sequential`, as in all networks of the series,
    is fused with it, unless the `nn.Sequential` has a forward of its own. Layers with fake quantisation settle.
    """
    copied = copy.deepcopy(model).eval()
    for layer in layers_of(copied):
        layer.settle()
    for sequence in copied.modules():
        if isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward:
            _fuse(sequence)
    return copied


def _fuse(sequence: nn.Sequential) -> None:
    names = list(sequence._modules)
    for first, second in itertools.pairwise(names):
        conv, bn = sequence._modules[first], sequence._modules[second]
        if not (isinstance(conv, nn.Conv2d) and _is_computed(bn)):
            continue
        if isinstance(bn, _BatchNorm) and bn.running_mean is not None:
            sequence._modules[first] = fuse_conv_bn_eval(conv, bn)
            sequence._modules[second] = nn.Identity()


def _is_computed(layer: nn.Module | None) -> bool:
    """Whether a layer is batch normalisation, and not folded into another layer already."""
    return isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not isinstance(layer, FoldedBatchNorm2d)
