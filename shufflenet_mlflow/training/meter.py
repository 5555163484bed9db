"""Training loss, accuracy and speed between two reports."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shufflenet_mlflow.runtime.distributed import World


class Meter:
    """Loss and accuracy since the last report, summed on the device so that no step waits for it.

    Each process sums its own; `collect` adds them up.
    """

    def __init__(self, device: torch.device, world: World | None = None) -> None:
        self._world = world or World()
        # loss * n, top-1 correct, top-5 correct, n
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._collected = torch.zeros_like(self._sums)
        self._bad_iters = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, iters: int, loss: Tensor, correct1: Tensor, correct5: Tensor, size: int) -> None:
        """Add a batch of `size` images: its mean loss, and its numbers of top-1 and top-5 correct predictions."""
        loss = loss.detach()
        counts = torch.stack((correct1, correct5)).double()
        self._sums[0] += loss.double() * size
        self._sums[1:3] += counts
        self._sums[3] += size
        first_bad = ~torch.isfinite(loss) & (self._bad_iters == 0)
        self._bad_iters += first_bad * iters

    def collect(self) -> None:
        """Add up the sums of all processes; every process has to call it."""
        if self._world.size > 1:
            self._collected += self._world.sum(self._sums)
            self._sums.zero_()
            bad = int(self._bad_iters.item())
            self._bad_iters.fill_(min((iters for iters in self._world.gather(bad) if iters), default=0))

    def first_bad(self) -> int | None:
        """Return the first iteration whose loss was not finite, or None; waits for the device."""
        return int(self._bad_iters.item()) or None

    def means(self) -> dict[str, float]:
        """Return the means over the images since the last `reset`; NaN before the first image."""
        loss, top1, top5, n = self.state_dict()
        if not n:
            return {"train/loss": math.nan, "train/top1": math.nan, "train/top5": math.nan}
        return {"train/loss": loss / n, "train/top1": top1 / n, "train/top5": top5 / n}

    def reset(self) -> None:
        """Set the sums to zero."""
        self._sums.zero_()
        self._collected.zero_()

    def state_dict(self) -> list[float]:
        """Return the sums as plain numbers."""
        sums: list[float] = (self._sums if self._world.size == 1 else self._collected).tolist()
        return sums

    def load_state_dict(self, sums: list[float]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            ValueError: `sums` has another length.
        """
        if len(sums) != len(self._sums):
            raise ValueError(f"meter_state has {len(sums)} numbers, not {len(self._sums)}")
        target = self._sums if self._world.size == 1 else self._collected
        target.copy_(torch.tensor(sums, dtype=torch.float64))


class Clock:
    """Measures iterations per second, without the time in `paused`."""

    def __init__(self, iters: int) -> None:
        self._start, self._iters = time.perf_counter(), iters

    def lap(self, iters: int) -> float:
        """Return the rate since the last call, or since the beginning."""
        now = time.perf_counter()
        rate = (iters - self._iters) / max(now - self._start, 1e-9)
        self._start, self._iters = now, iters
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within the block."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began
