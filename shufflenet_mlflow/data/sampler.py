"""Which images make up which batch: a pure function of seed and iteration.

Nothing here keeps a position, so any iteration can be the first: resuming costs the same at iteration 10 and
at iteration 1,000,000, and does not depend on the number of worker processes.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from shufflenet_mlflow.errors import DataError

Key = tuple[int, int]
"""(epoch, index of the sample): the epoch is part of it because augmentation draws depend on it."""

REESTIMATION_EPOCH = -1
"""The pass over the training set that re-estimates the BN statistics; no epoch of training."""


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from integers; close inputs give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator)


@dataclass(frozen=True)
class SampleOrder:
    """The order in which training goes through the data: a new permutation each epoch, whole batches only.

    The images that do not fill the last batch of an epoch wait for another epoch's permutation.
    """

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            raise DataError(
                f"the training set has {self.num_samples} images, fewer than one batch of "
                f"{self.batch_size}; use --batch-size {max(1, self.num_samples)} or less"
            )

    @property
    def iters_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.num_samples // self.batch_size

    def epoch_of(self, iters: int) -> int:
        """How many epochs are complete after `iters` iterations."""
        return iters // self.iters_per_epoch

    def batch(self, iters: int) -> list[Key]:
        """The samples of the iteration that follows `iters` completed ones."""
        epoch, position = divmod(iters, self.iters_per_epoch)
        return self._slice(epoch, position)

    def reestimation_batch(self, position: int) -> list[Key]:
        """The samples of batch `position` of the pass that re-estimates the BN statistics."""
        return self._slice(REESTIMATION_EPOCH, position)

    def _slice(self, epoch: int, position: int) -> list[Key]:
        order = _permutation(self.num_samples, self.seed, epoch)
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        return [(epoch, index) for index in chosen.tolist()]

    def state_dict(self, iters: int) -> dict[str, Any]:
        """What a checkpoint holds of this: enough to see whether another order is the same one."""
        epoch, position = divmod(iters, self.iters_per_epoch)
        return {**asdict(self), "epoch": epoch, "position": position}


class TrainBatches(Sampler[list[Key]]):
    """The batches from iteration `start` up to, not including, iteration `stop`."""

    def __init__(self, order: SampleOrder, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.order.batch(iters) for iters in range(self.start, self.stop))


class ReestimationBatches(Sampler[list[Key]]):
    """`count` batches, at most an epoch's worth, in a permutation of their own."""

    def __init__(self, order: SampleOrder, count: int) -> None:
        self.order, self.count = order, min(count, order.iters_per_epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.order.reestimation_batch(position) for position in range(self.count))


class EvalBatches(Sampler[list[Key]]):
    """Every sample once, in order; the last batch may be smaller."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, self.num_samples, self.batch_size):
            stop = min(start + self.batch_size, self.num_samples)
            yield [(0, index) for index in range(start, stop)]
