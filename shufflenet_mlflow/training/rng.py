"""The random state of training: what the network draws, for dropout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.data.sampler import derive_seed


class StepRandomness:
    """Seeds for what the network itself draws: one number per iteration, and from it one seed per micro-batch.

    So draws do not depend on which process computes which micro-batch, and one small state is all there is to save:
    devices' own generators are reseeded for each micro-batch.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._seed = 0

    def begin_iteration(self) -> None:
        """Draw the iteration's number, the same in every process."""
        self._seed = int(torch.randint(2**62, (), generator=self.generator))

    def begin_micro_batch(self, index: int) -> None:
        """Seed the generators of all devices for the micro-batch `index`, counted over all processes."""
        torch.manual_seed(derive_seed(self._seed, index))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the generator that all seeds follow from."""
        return {"cpu": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the output of `state_dict`."""
        self.generator.set_state(state["cpu"])
