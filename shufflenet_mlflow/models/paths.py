"""Paths through a supernet: what they cost, and which one an iteration of training takes (arXiv:1904.00420, 3.4).

Every layer's work is in proportion to the area of the image, except the classifier's. So a network's place between the
cheapest and the most expensive one is the same for every input size and number of classes, and the paths of training
are drawn by what they cost at 224 pixels with 1,000 classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from shufflenet_mlflow.data.sampler import derive_seed
from shufflenet_mlflow.models.search_space import (
    BRANCHES,
    LARGEST_SCALE,
    NETWORK,
    STAGE_UNITS,
    STAGE_WIDTHS,
    UNITS,
    WIDTHS,
    Genes,
    inner_width,
)

LOWEST, HIGHEST, BIN = 290_000_000, 360_000_000, 10_000_000
"""Multiply-accumulates of the paths of training: a bin of this width is drawn, between these two."""
MOST_TRIES = 500
"""Paths that are drawn until one lies in the bin; then any is taken."""

PUBLISHED_LIMIT = 330_000_000
"""The most multiply-accumulates of the published search, at 224 pixels with 1,000 classes."""

PATH_STREAM = -2
"""Tells the seeds of paths from those of epochs, images and micro-batches."""


@dataclass(frozen=True)
class CostTable:
    """Costs of every network of a search: sums over its units."""

    rest: int
    """Cost of everything but the units: the first and the last convolution, and the classifier."""
    units: tuple[tuple[int, ...], ...]
    """Cost of each branch of each unit, (20, 4); or of each of its widths, (20, 4 * 10): those of a branch in a row."""

    @property
    def has_widths(self) -> bool:
        """Whether networks have widths, too."""
        return len(self.units[0]) > BRANCHES

    def of(self, genes: Sequence[int]) -> int:
        """Return what a network costs."""
        return int(self.of_many(torch.tensor([genes])))

    def of_many(self, genes_PG: Tensor) -> Tensor:
        """Return int64 (P): what each of P networks costs.

        Args:
            genes_PG: int64 (P, 20 or 40); see `Genes`.
        """
        units_UO, options_PU = torch.tensor(self.units), genes_PG[:, :UNITS]
        if self.has_widths:
            options_PU = options_PU * len(WIDTHS) + genes_PG[:, UNITS:]
        return self.rest + units_UO.gather(1, options_PU.T).sum(0)

    @property
    def lowest(self) -> int:
        """Cost of the cheapest network."""
        return self.rest + sum(map(min, self.units))

    @property
    def highest(self) -> int:
        """Cost of the most expensive network."""
        return self.rest + sum(map(max, self.units))


class MacsTable(CostTable):
    """The multiply-accumulates of every network, for one image."""

    def macs(self, genes: Sequence[int]) -> int:
        """Return a network's multiply-accumulates for one image."""
        return self.of(genes)


@cache
def macs_table(num_classes: int = 1000, input_size: int = 224, *, widths: bool = False) -> MacsTable:
    """Count the multiply-accumulates of every layer of networks, on the meta device; results are cached.

    They are counted in the widest networks. A layer's are in proportion to its widths.

    Args:
        widths: of a channel search.
    """
    from shufflenet_mlflow.models.cost import macs_by_layer  # which imports the catalog, which this room's supernet
    from shufflenet_mlflow.models.spec import ModelSpec  # is a part of

    scales, rest = WIDTHS if widths else (1.0,), 0
    outputs = [width for width, count in zip(STAGE_WIDTHS, STAGE_UNITS, strict=True) for _ in range(count)]
    units = [[[0 for _ in scales] for _ in range(BRANCHES)] for _ in outputs]
    for choice in range(BRANCHES):
        network = ModelSpec(NETWORK, (choice,) * UNITS, (LARGEST_SCALE,) * UNITS).on_meta(num_classes)
        rest = 0
        for name, macs in macs_by_layer(network, input_size).items():
            room, *place = name.split(".")
            if room != "features":
                rest += macs
                continue
            number, layer = int(place[0]), cast(nn.Conv2d, network.get_submodule(name))
            widest = inner_width(outputs[number], LARGEST_SCALE)  # unlike the widths of what is around the branch
            power = (layer.out_channels == widest) + (layer.in_channels == widest and layer.groups == 1)
            for index, scale in enumerate(scales):
                units[number][choice][index] += macs * inner_width(outputs[number], scale) ** power // widest**power
    return MacsTable(rest, tuple(tuple(chain(*branches)) for branches in units))


def scaled_limit(num_classes: int, input_size: int, limit: int = PUBLISHED_LIMIT) -> int:
    """Return the multiply-accumulates that stand for `limit` at this size, among the networks that there are."""
    reference, table = macs_table(), macs_table(num_classes, input_size)
    share = (limit - reference.lowest) / (reference.highest - reference.lowest)
    return round(table.lowest + share * (table.highest - table.lowest))


def uniform_genes(count: int, generator: torch.Generator, *, widths: bool = False) -> Tensor:
    """Return int64 (count, 20 or 40): networks of the search space, all equally likely; see `Genes`."""
    choices_PU = torch.randint(BRANCHES, (count, UNITS), generator=generator)
    if not widths:
        return choices_PU
    return torch.cat((choices_PU, torch.randint(len(WIDTHS), (count, UNITS), generator=generator)), 1)


def draw_path(seed: int, iters: int, *, widths: bool = False) -> Genes:
    """Return the path of the iteration after `iters` completed ones; it follows from the seed, in every process."""
    generator = torch.Generator().manual_seed(derive_seed(seed, PATH_STREAM, iters))
    low = LOWEST + BIN * int(torch.randint((HIGHEST - LOWEST) // BIN, (), generator=generator))
    paths_PG = uniform_genes(MOST_TRIES + 1, generator, widths=widths)
    macs_P = macs_table(widths=widths).of_many(paths_PG)[:MOST_TRIES]
    fitting = ((macs_P >= low) & (macs_P <= low + BIN)).nonzero()
    number = int(fitting[0]) if len(fitting) else MOST_TRIES
    return tuple(paths_PG[number].tolist())
