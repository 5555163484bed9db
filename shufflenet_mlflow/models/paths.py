"""Paths through the supernet: what they cost, and which one an iteration of training takes (arXiv:1904.00420, 3.4).

Every layer's work is in proportion to the area of the image, except the classifier's. So a network's place between the
cheapest and the most expensive one is the same for every input size and number of classes, and the paths of training
are drawn by what they cost at 224 pixels with 1,000 classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shufflenet_mlflow.data.sampler import derive_seed
from shufflenet_mlflow.models.search_space import BRANCHES, SUPERNET, UNITS

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
    """Multiply-accumulates of every network of the search space with scales of 1: a sum over its units."""

    rest: int
    """Cost of everything but the units: the first and the last convolution, and the classifier."""
    units: tuple[tuple[int, ...], ...]
    """Cost of each branch of each unit, (20, 4)."""

    def of(self, choices: Sequence[int]) -> int:
        """Return what a network costs."""
        return self.rest + sum(branches[choice] for branches, choice in zip(self.units, choices, strict=True))

    def of_many(self, choices_PU: Tensor) -> Tensor:
        """Return int64 (P): what each of P networks costs.

        Args:
            choices_PU: int64 (P, 20).
        """
        units_UB = torch.tensor(self.units)
        return self.rest + units_UB.gather(1, choices_PU.T).sum(0)

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

    def macs(self, choices: Sequence[int]) -> int:
        """Return a network's multiply-accumulates for one image."""
        return self.of(choices)


@cache
def macs_table(num_classes: int = 1000, input_size: int = 224) -> MacsTable:
    """Count the multiply-accumulates of every layer of the supernet, on the meta device; results are cached."""
    from shufflenet_mlflow.models.cost import macs_by_layer  # which imports the catalog, which this room's supernet
    from shufflenet_mlflow.models.spec import ModelSpec  # is a part of

    units, rest = [[0] * BRANCHES for _ in range(UNITS)], 0
    for choice in range(BRANCHES):
        supernet = ModelSpec(SUPERNET).on_meta(num_classes)
        supernet.path = (choice,) * UNITS  # type: ignore[assignment]
        rest = 0
        for name, macs in macs_by_layer(supernet, input_size).items():
            room, *place = name.split(".")
            if room == "features":
                units[int(place[0])][choice] += macs
            else:
                rest += macs
    return MacsTable(rest, tuple(map(tuple, units)))


def scaled_limit(num_classes: int, input_size: int, limit: int = PUBLISHED_LIMIT) -> int:
    """Return the multiply-accumulates that stand for `limit` at this size, among the networks that there are."""
    reference, table = macs_table(), macs_table(num_classes, input_size)
    share = (limit - reference.lowest) / (reference.highest - reference.lowest)
    return round(table.lowest + share * (table.highest - table.lowest))


def uniform_choices(count: int, generator: torch.Generator) -> Tensor:
    """Return int64 (count, 20): networks of the search space, all equally likely."""
    return torch.randint(BRANCHES, (count, UNITS), generator=generator)


def draw_path(seed: int, iters: int) -> tuple[int, ...]:
    """Return the path of the iteration after `iters` completed ones; it follows from the seed, in every process."""
    generator = torch.Generator().manual_seed(derive_seed(seed, PATH_STREAM, iters))
    low = LOWEST + BIN * int(torch.randint((HIGHEST - LOWEST) // BIN, (), generator=generator))
    paths_PU = uniform_choices(MOST_TRIES + 1, generator)
    macs_P = macs_table().of_many(paths_PU)[:MOST_TRIES]
    fitting = ((macs_P >= low) & (macs_P <= low + BIN)).nonzero()
    number = int(fitting[0]) if len(fitting) else MOST_TRIES
    return tuple(paths_PU[number].tolist())
