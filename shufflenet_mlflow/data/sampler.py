"""Sampling: the images of every batch, as a pure function of seed and iteration.

No position is kept, so training can start at any iteration: resuming costs the same at iteration 10 and at
1,000,000, and does not depend on the number of workers.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.text import counted

Key = tuple[int, ...]
"""(epoch, index of the sample), and its place in the epoch where it may come again. Augmentation depends on all."""

REESTIMATION_EPOCH = -1
"""The epoch number of BN re-estimation, which is not an epoch of training."""


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed; close inputs give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator)


@dataclass(frozen=True)
class SampleOrder:
    """The order of training samples: a new permutation each epoch, full batches only.

    Samples that do not fill a batch at the end of an epoch are dropped from that epoch.

    Raises:
        DataError: there are fewer samples than a batch holds.
    """

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            remedy = f"use --batch-size {self.num_samples} or less" if self.num_samples > 1 else "add images"
            raise DataError(
                f"the training set has {counted(self.num_samples, 'image')}, "
                f"fewer than one batch of {self.batch_size}; {remedy}",
                code="too-few-images",
            )

    @property
    def iters_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self.num_samples // self.batch_size

    def over(self, labels: NDArray[np.int32]) -> "SampleOrder":
        """Return the same order over other samples.

        Args:
            labels: (num_samples,) the class of each of them.
        """
        return replace(self, num_samples=len(labels))

    def epoch_of(self, iters: int) -> int:
        """Return the number of epochs completed after `iters` iterations."""
        return iters // self.iters_per_epoch

    def batch(self, iters: int) -> list[Key]:
        """Return the samples of the iteration after `iters` completed ones."""
        epoch, position = divmod(iters, self.iters_per_epoch)
        return self._slice(epoch, position)

    def reestimation_batch(self, position: int) -> list[Key]:
        """Return the samples of batch `position` of BN re-estimation."""
        return self._slice(REESTIMATION_EPOCH, position)

    def _slice(self, epoch: int, position: int) -> list[Key]:
        indices = self._samples(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        return [(epoch, index) for index in indices.tolist()]

    def _samples(self, epoch: int) -> Tensor:
        """Return the epoch's samples, (num_samples,) int64."""
        return _permutation(self.num_samples, self.seed, epoch)

    def state_dict(self, iters: int) -> dict[str, Any]:
        """Return the checkpoint's entry `sampler_state`: the order, and the position after `iters` iterations."""
        epoch, position = divmod(iters, self.iters_per_epoch)
        order = {"num_samples": self.num_samples, "batch_size": self.batch_size, "seed": self.seed}
        return {**order, "epoch": epoch, "position": position}


@dataclass(frozen=True)
class BalancedOrder(SampleOrder):
    """An order in which all classes are equally frequent: for each place a class is drawn, and then one of its samples.

    An epoch has as many samples as without it. A sample that comes several times is augmented differently each time.

    Args:
        labels: (num_samples,) the class of each sample.
    """

    labels: NDArray[np.int32] = field(repr=False, compare=False, kw_only=True)
    _drawn: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def over(self, labels: NDArray[np.int32]) -> "BalancedOrder":
        """Return the same order over other samples; see `SampleOrder.over`."""
        return replace(self, num_samples=len(labels), labels=labels)

    def _slice(self, epoch: int, position: int) -> list[Key]:
        first = position * self.batch_size
        keys = super()._slice(epoch, position)
        return [(*key, place) for place, key in enumerate(keys, first)]

    def _samples(self, epoch: int) -> Tensor:
        if epoch not in self._drawn:
            self._drawn.clear()  # batches come in order: one epoch at a time
            self._drawn[epoch] = self._draw(epoch)
        return self._drawn[epoch]

    def _draw(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        by_class = torch.from_numpy(np.argsort(self.labels, kind="stable"))
        counts = torch.from_numpy(np.unique(self.labels, return_counts=True)[1])
        classes = torch.randint(len(counts), (self.num_samples,), generator=generator)
        shares = torch.rand(self.num_samples, generator=generator, dtype=torch.float64)
        firsts = counts.cumsum(0) - counts
        return by_class[firsts[classes] + (shares * counts[classes]).long()]


@dataclass(frozen=True)
class MicroBatches:
    """The division of each batch into micro-batches: the same number in each process, one after the other.

    Micro-batches are consecutive slices of the batch whose sizes differ by at most one. So the content of a batch does
    not depend on the number of processes, nor does that of a micro-batch as long as their total number is the same.
    """

    batch_size: int
    rank: int = 0
    processes: int = 1
    accumulation_steps: int = 1
    """Micro-batches per process."""

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int, rank: int, processes: int) -> "MicroBatches":
        """Divide into as few micro-batches as possible, of at most `micro_batch_size` images each."""
        return cls(batch_size, rank, processes, -(-batch_size // (micro_batch_size * processes)))

    @property
    def count(self) -> int:
        """Number of micro-batches in all processes together."""
        return self.processes * self.accumulation_steps

    @property
    def smallest(self) -> int:
        """Number of images in the smallest micro-batch."""
        return self.batch_size // self.count

    @property
    def local_indices(self) -> range:
        """Indices of this process's micro-batches among all of them."""
        return range(self.rank * self.accumulation_steps, (self.rank + 1) * self.accumulation_steps)

    def cut(self, batch: list[Key]) -> Iterator[list[Key]]:
        """Yield this process's micro-batches of a batch."""
        for index in self.local_indices:
            yield batch[index * len(batch) // self.count : (index + 1) * len(batch) // self.count]


class TrainBatches(Sampler[list[Key]]):
    """This process's micro-batches of the iterations from `start` up to, not including, `stop`."""

    def __init__(self, order: SampleOrder, start: int, stop: int, micro_batches: MicroBatches | None = None) -> None:
        self.order, self.start, self.stop = order, start, stop
        self.micro_batches = micro_batches or MicroBatches(order.batch_size)

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.micro_batches.accumulation_steps

    def __iter__(self) -> Iterator[list[Key]]:
        for iters in range(self.start, self.stop):
            yield from self.micro_batches.cut(self.order.batch(iters))


class ReestimationBatches(Sampler[list[Key]]):
    """This process's micro-batches of the first `count` batches of BN re-estimation; at most an epoch's."""

    def __init__(self, order: SampleOrder, count: int, micro_batches: MicroBatches | None = None) -> None:
        self.order, self.count = order, min(count, order.iters_per_epoch)
        self.micro_batches = micro_batches or MicroBatches(order.batch_size)

    def __len__(self) -> int:
        return self.count * self.micro_batches.accumulation_steps

    def __iter__(self) -> Iterator[list[Key]]:
        for position in range(self.count):
            yield from self.micro_batches.cut(self.order.reestimation_batch(position))


class EvalBatches(Sampler[list[Key]]):
    """Every sample once, in order, in batches that the processes take in turn; the last batch may be smaller."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.processes = rank, processes

    @property
    def max_batches(self) -> int:
        """Number of batches of the process that has most."""
        return -(-self.num_samples // (self.batch_size * self.processes))

    def __len__(self) -> int:
        return len(self._starts())

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.num_samples, self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in self._starts():
            stop = min(start + self.batch_size, self.num_samples)
            yield [(0, index) for index in range(start, stop)]
