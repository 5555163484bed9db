"""The random numbers that the network itself draws in training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.data.sampler import derive_seed


class StepRandomness:
    """What the network itself draws, for dropout: one number per iteration, from which each part's generators follow.

    So nothing depends on which process computes which part, one small state is all there is to save, and a device's
    own generator needs no saving: it is seeded anew for each part.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._seed = 0

    def begin_iteration(self) -> None:
        """Draw this iteration's number; the same in every process."""
        self._seed = int(torch.randint(2**62, (), generator=self.generator))

    def begin_part(self, part: int) -> None:
        """Seed the generators of all devices for that part of the batch."""
        torch.manual_seed(derive_seed(self._seed, part))

    def state_dict(self) -> dict[str, Tensor]:
        """The generator that everything follows from."""
        return {"cpu": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.generator.set_state(state["cpu"])
