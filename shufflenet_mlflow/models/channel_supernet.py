"""The supernet of a channel search (arXiv:1904.00420): every branch of every unit, in every width.

A path has a width for each unit, too, one of `WIDTHS`. The widths of a branch share its weights: a narrower one takes
the first channels of the widest. Each weight is kept in blocks, so that an iteration of training changes only those
that its path takes: the others have no gradient. The statistics of batch normalisation are whole; a path updates those
of its channels.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d
from torch.nn.modules.batchnorm import _BatchNorm

from shufflenet_mlflow.models.blocks import ShuffleUnit, unit_specs
from shufflenet_mlflow.models.oneshot import FIRST_WIDTH
from shufflenet_mlflow.models.oneshot_supernet import OneShotSupernet
from shufflenet_mlflow.models.search_space import (
    LARGEST_SCALE,
    SEARCHED_CHOICES,
    STAGE_UNITS,
    STAGE_WIDTHS,
    UNITS,
    WIDTHS,
    Genes,
    genes_of,
    inner_width,
)


class WidthConv(nn.Module):
    """A convolution of a branch whose inner width varies: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    Args:
        conv: that of the widest branch. Its width is output channels, input channels or both.
        widths: all inner widths; the last one is the widest.
    """

    def __init__(self, conv: nn.Conv2d, widths: Sequence[int]) -> None:
        super().__init__()
        self.is_depthwise = conv.groups > 1
        self.widens_output = conv.out_channels == widths[-1]
        self.widens_input = conv.in_channels == widths[-1] and not self.is_depthwise
        self.stride, self.padding = conv.stride[0], cast(int, conv.padding[0])
        self.blocks = nn.ParameterList(block.detach().clone() for block in self._blocks(conv.weight, widths))
        """The weight with the smallest width; then, for each further width, new input and new output channels."""

    def _blocks(self, weight: Tensor, widths: Sequence[int]) -> Iterator[Tensor]:
        outputs = [width if self.widens_output else weight.shape[0] for width in widths]
        inputs = [width if self.widens_input else weight.shape[1] for width in widths]
        yield weight[: outputs[0], : inputs[0]]
        for (before, output), (first, input_) in zip(pairwise(outputs), pairwise(inputs), strict=True):
            if self.widens_input:
                yield weight[:before, first:input_]
            if self.widens_output:
                yield weight[before:output, :input_]

    def weight(self, width: int) -> Tensor:
        """Return the weight, (C_out, C_in, kernel, kernel), with a width, an index into `WIDTHS`."""
        taken = list(self.blocks)[: 1 + width * (self.widens_output + self.widens_input)]
        if not (self.widens_output and self.widens_input):
            return torch.cat(taken, dim=int(self.widens_input))
        weight: Tensor = taken[0]
        for of_inputs, of_outputs in zip(taken[1::2], taken[2::2], strict=True):
            weight = torch.cat((torch.cat((weight, of_inputs), 1), of_outputs))
        return weight

    def forward(self, x_NCHW: Tensor, width: int) -> Tensor:
        groups = x_NCHW.shape[1] if self.is_depthwise else 1
        return conv2d(x_NCHW, self.weight(width), None, self.stride, self.padding, groups=groups)


class WidthBranch(nn.Sequential):
    """A branch with a variable inner width, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    Args:
        branch: the widest.
        widths: as for `WidthConv`.
    """

    def __init__(self, branch: nn.Sequential, widths: Sequence[int]) -> None:
        widest = widths[-1]  # no other layer of a unit has that many channels
        super().__init__(
            *(
                WidthConv(layer, widths)
                if isinstance(layer, nn.Conv2d) and widest in (layer.in_channels, layer.out_channels)
                else layer
                for layer in branch
            )
        )
        self.width = WIDTHS.index(1.0)
        """The width that images pass, an index into `WIDTHS`."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, WidthConv):
                x_NCHW = layer(x_NCHW, self.width)
            elif isinstance(layer, _BatchNorm):
                x_NCHW = functional_call(layer, _statistics(layer, x_NCHW.shape[1]), (x_NCHW,))
            else:
                x_NCHW = layer(x_NCHW)
        return x_NCHW


def _statistics(layer: _BatchNorm, channels: int) -> dict[str, Tensor]:
    """Return views on the running statistics of the first channels."""
    return {name: getattr(layer, name)[:channels] for name in ("running_mean", "running_var")}


class ChannelSupernet(OneShotSupernet):
    """As `OneShotSupernet`, but a path has widths, too; see `Genes`."""

    validated_path = genes_of(SEARCHED_CHOICES, (1.0,) * UNITS)

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, LARGEST_SCALE)
        for branches, spec in zip(self.features, unit_specs(FIRST_WIDTH, STAGE_WIDTHS, STAGE_UNITS), strict=True):
            widths = [inner_width(spec.out_channels, scale) for scale in WIDTHS]
            for unit in cast(Iterable[ShuffleUnit], branches):
                unit.branch_main = WidthBranch(unit.branch_main, widths)

    def unit_on(self, path: Genes, number: int) -> ShuffleUnit:
        unit = super().unit_on(path, number)
        cast(WidthBranch, unit.branch_main).width = path[UNITS + number]
        return unit

    def weights_on(self, path: Genes) -> dict[str, Tensor]:
        weights = super().weights_on(path)
        for number in range(UNITS):
            width, branch = path[UNITS + number], self.unit_on(path, number).branch_main
            for index, layer in enumerate(branch):
                if isinstance(layer, WidthConv):
                    weights[f"features.{number}.branch_main.{index}.weight"] = layer.weight(width)
        return weights


def build(name: str, num_classes: int) -> ChannelSupernet:
    """Build the supernet with random weights.

    Args:
        name: not used; all `build` functions take it.
        num_classes: width of the classifier.
    """
    return ChannelSupernet(num_classes)
