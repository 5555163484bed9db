"""Training loss and accuracy between two reports."""

import math

import torch
from torch import Tensor

from shufflenet_mlflow.runtime.distributed import World


class Meter:
    """Loss and accuracy since the last report, summed on the device so that no step waits for it.

    With several processes each sums up its own; `collect` brings them together.
    """

    def __init__(self, device: torch.device, world: World | None = None) -> None:
        self._world = world or World()
        # loss * n, correct in one, correct in five, n
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._collected = torch.zeros_like(self._sums)
        self._bad_iters = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, iters: int, loss: Tensor, correct1: Tensor, correct5: Tensor, size: int) -> None:
        """Add one batch: the mean loss of `size` images, and how many were right."""
        loss = loss.detach()
        counts = torch.stack((correct1, correct5)).double()
        self._sums[0] += loss.double() * size
        self._sums[1:3] += counts
        self._sums[3] += size
        first_bad = ~torch.isfinite(loss) & (self._bad_iters == 0)
        self._bad_iters += first_bad * iters

    def collect(self) -> None:
        """Bring all processes' sums together; all of them have to take part."""
        if self._world.size > 1:
            self._collected += self._world.sum(self._sums)
            self._sums.zero_()
            bad = int(self._bad_iters.item())
            self._bad_iters.fill_(min((iters for iters in self._world.gather(bad) if iters), default=0))

    def first_bad(self) -> int | None:
        """The first iteration whose loss was not finite; None if there was none."""
        return int(self._bad_iters.item()) or None

    def means(self) -> dict[str, float]:
        """Means over the images since the last `reset`; NaN before the first."""
        loss, top1, top5, n = self.state_dict()
        if not n:
            return {"train/loss": math.nan, "train/top1": math.nan, "train/top5": math.nan}
        return {"train/loss": loss / n, "train/top1": top1 / n, "train/top5": top5 / n}

    def reset(self) -> None:
        """Begin a new stretch."""
        self._sums.zero_()
        self._collected.zero_()

    def state_dict(self) -> list[float]:
        """The sums, as plain numbers."""
        sums: list[float] = (self._sums if self._world.size == 1 else self._collected).tolist()
        return sums

    def load_state_dict(self, sums: list[float]) -> None:
        """The inverse of `state_dict`."""
        if len(sums) != len(self._sums):
            raise ValueError(f"meter_state has {len(sums)} numbers, not {len(self._sums)}")
        target = self._sums if self._world.size == 1 else self._collected
        target.copy_(torch.tensor(sums, dtype=torch.float64))
