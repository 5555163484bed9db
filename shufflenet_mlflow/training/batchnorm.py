"""Running statistics of batch normalisation: the same on every process, and re-estimated at the end."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from shufflenet_mlflow.runtime.distributed import World


def bn_layers(model: nn.Module) -> list[_BatchNorm]:
    """All layers of batch normalisation that keep running statistics."""
    found = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [layer for layer in found if layer.running_mean is not None]


class RunningStatistics:
    """Makes an iteration count once for the running statistics, whatever parts it is computed in.

    Each part updates them from where the iteration began; the mean of the results, over all parts in all processes,
    is what the next iteration begins with. Without that they would depend on the order of the parts, and on the process
    that happens to write the checkpoint. (DistributedDataParallel takes the first process's.)

    Args:
        rounds: parts per process.
    """

    def __init__(self, model: nn.Module, world: World, rounds: int) -> None:
        layers = bn_layers(model)
        self._means = [cast(Tensor, tensor) for layer in layers for tensor in (layer.running_mean, layer.running_var)]
        self._counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        self._world, self._parts = world, world.size * rounds
        self._before: list[Tensor] = []
        self._sum = torch.empty(0)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around the forward pass of one part."""
        if self._parts == 1:
            yield
            return
        kept = [*self._means, *self._counts]
        first = not self._before
        if first:
            self._before = [tensor.clone() for tensor in kept]
        else:
            for tensor, before in zip(kept, self._before, strict=True):
                tensor.copy_(before)
        yield
        after = self._flat()
        self._sum = after if first else self._sum + after

    def combine(self) -> None:
        """After the last part."""
        if self._parts == 1:
            return
        self._before = []
        self._set(self._world.sum(self._sum) / self._parts)

    def _flat(self) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in self._means]) if self._means else torch.empty(0)

    def _set(self, flat: Tensor) -> None:
        sizes = [tensor.numel() for tensor in self._means]
        for tensor, mean in zip(self._means, torch.split(flat, sizes), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def average(self) -> None:
        """Replace each process's statistics by the mean over all of them."""
        if self._world.size > 1:
            self._set(self._world.sum(self._flat()) / self._world.size)


class _AllOf(nn.ModuleList):
    """Several networks that see the same input."""

    def forward(self, x: Tensor) -> None:
        for model in self:
            model(x)


def reestimate_bn(models: Sequence[nn.Module], inputs: Iterable[Tensor], world: World | None = None) -> None:
    """Replace the running statistics by the cumulative average over `inputs`, and over all processes.

    Args:
        models: all in one pass over `inputs`.
        inputs: float (N, 3, H, W) batches on the models' device; as many in each process.
    """
    together = _AllOf(models)
    modes = [model.training for model in models]
    layers = bn_layers(together)
    momenta = [layer.momentum for layer in layers]
    try:
        together.train()
        update_bn(inputs, together)
    finally:  # `update_bn` leaves them unset when `inputs` raises
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    RunningStatistics(together, world or World(), 1).average()
