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

Part = list[Key]
"""The samples of one forward pass."""

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
            way_out = f"use --batch-size {self.num_samples} or less" if self.num_samples > 1 else "add images"
            raise DataError(
                f"the training set has {self.num_samples} images, fewer than one batch of {self.batch_size}; {way_out}",
                code="too-few-images",
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


@dataclass(frozen=True)
class MicroBatches:
    """How an iteration's batch is divided: into parts, one after the other in each process.

    The parts lie in the batch in order, of equal size but for one image, and each process has as many consecutive
    ones as any other. So what is in the batch does not depend on the number of processes, and neither does what is in
    a part, if the number of parts is the same.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    accumulation_steps: int = 1
    """Parts per process."""

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int, rank: int, processes: int) -> "MicroBatches":
        """The fewest parts of at most `micro_batch_size` images, as many in each process."""
        return cls(batch_size, rank, processes, -(-batch_size // (micro_batch_size * processes)))

    @property
    def count(self) -> int:
        """In all processes together."""
        return self.processes * self.accumulation_steps

    @property
    def smallest(self) -> int:
        """Images in the smallest part."""
        return self.batch_size // self.count

    @property
    def local_indices(self) -> range:
        """The numbers of this process's parts."""
        return range(self.rank * self.accumulation_steps, (self.rank + 1) * self.accumulation_steps)

    def cut(self, batch: list[Key]) -> Iterator[Part]:
        """This process's parts of a batch."""
        for part in self.local_indices:
            yield batch[part * len(batch) // self.count : (part + 1) * len(batch) // self.count]


class TrainBatches(Sampler[Part]):
    """This process's parts of the batches from iteration `start` up to, not including, iteration `stop`."""

    def __init__(self, order: SampleOrder, start: int, stop: int, micro_batches: MicroBatches | None = None) -> None:
        self.order, self.start, self.stop = order, start, stop
        self.micro_batches = micro_batches or MicroBatches(order.batch_size)

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.micro_batches.accumulation_steps

    def __iter__(self) -> Iterator[Part]:
        for iters in range(self.start, self.stop):
            yield from self.micro_batches.cut(self.order.batch(iters))


class ReestimationBatches(Sampler[Part]):
    """This process's parts of `count` batches, at most an epoch's worth, in a permutation of their own."""

    def __init__(self, order: SampleOrder, count: int, micro_batches: MicroBatches | None = None) -> None:
        self.order, self.count = order, min(count, order.iters_per_epoch)
        self.micro_batches = micro_batches or MicroBatches(order.batch_size)

    def __len__(self) -> int:
        return self.count * self.micro_batches.accumulation_steps

    def __iter__(self) -> Iterator[Part]:
        for position in range(self.count):
            yield from self.micro_batches.cut(self.order.reestimation_batch(position))


class EvalBatches(Sampler[Part]):
    """Every sample once, in order; the last batch may be smaller. Of several processes each takes every so-manieth."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.processes = rank, processes

    @property
    def max_batches(self) -> int:
        """The most batches that any process has."""
        return -(-self.num_samples // (self.batch_size * self.processes))

    def __len__(self) -> int:
        return len(self._starts())

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.num_samples, self.batch_size * self.processes)

    def __iter__(self) -> Iterator[Part]:
        for start in self._starts():
            stop = min(start + self.batch_size, self.num_samples)
            yield [(0, index) for index in range(start, stop)]
