"""Running statistics of batch normalisation: equal in all processes, re-estimated after training, or frozen."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shufflenet_mlflow.models.batchnorm import FrozenBatchNorm2d
from shufflenet_mlflow.runtime.distributed import World


def freeze(modules: Iterable[nn.Module]) -> None:
    """Keep weights and BN statistics of these modules as they are, in training and in BN re-estimation."""
    for module in modules:
        module.requires_grad_(requires_grad=False)
        for layer in module.modules():
            if isinstance(layer, _BatchNorm) and not isinstance(layer, FrozenBatchNorm2d):
                layer.__class__ = FrozenBatchNorm2d
                layer.eval()


def bn_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisation layers that update running statistics."""
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None and not isinstance(layer, FrozenBatchNorm2d)]


class RunningStatistics:
    """Updates the running statistics once per iteration, however many micro-batches it is divided into.

    Each micro-batch updates them from their values at the start of the iteration; the mean of the results, over all
    micro-batches in all processes, is kept. Otherwise they would depend on the order of the micro-batches, and on the
    process that writes the checkpoint. (DistributedDataParallel broadcasts the first process's.)

    Args:
        accumulation_steps: micro-batches per process.
    """

    def __init__(self, model: nn.Module, world: World, accumulation_steps: int) -> None:
        layers = bn_layers(model)
        self._means = [cast(Tensor, tensor) for layer in layers for tensor in (layer.running_mean, layer.running_var)]
        self._counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        self._world, self._micro_batches = world, world.size * accumulation_steps
        self._before: list[Tensor] = []
        self._sum = torch.empty(0)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Wrap the forward pass of one micro-batch."""
        if self._micro_batches == 1:
            yield
            return
        statistics = [*self._means, *self._counts]
        first = not self._before
        if first:
            self._before = [tensor.clone() for tensor in statistics]
        else:
            for tensor, before in zip(statistics, self._before, strict=True):
                tensor.copy_(before)
        yield
        after = self._flat()
        self._sum = after if first else self._sum + after

    def combine(self) -> None:
        """Set the statistics to the mean over the iteration's micro-batches; call after the last one."""
        if self._micro_batches == 1:
            return
        self._before = []
        self._set(self._world.sum(self._sum) / self._micro_batches)

    def _flat(self) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in self._means]) if self._means else torch.empty(0)

    def _set(self, flat: Tensor) -> None:
        sizes = [tensor.numel() for tensor in self._means]
        for tensor, mean in zip(self._means, torch.split(flat, sizes), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def average(self) -> None:
        """Replace each process's statistics by their mean over all processes."""
        if self._world.size > 1:
            self._set(self._world.sum(self._flat()) / self._world.size)


class _AllOf(nn.ModuleList):
    """Several networks that are given the same input."""

    def forward(self, x: Tensor) -> None:
        for model in self:
            model(x)


def reestimate_bn(models: Sequence[nn.Module], inputs: Iterable[Tensor], world: World | None = None) -> None:
    """Replace the running statistics by their average over `inputs` and over all processes.

    Args:
        models: all are updated in one pass over `inputs`.
        inputs: float (N, 3, H, W) batches on the models' device; the same number in each process.
    """
    all_models = _AllOf(models)
    modes = [model.training for model in models]
    layers = bn_layers(all_models)
    momenta = [layer.momentum for layer in layers]
    try:
        all_models.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over all batches
        with torch.no_grad():
            for images in inputs if layers else ():
                all_models(images)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    RunningStatistics(all_models, world or World(), 1).average()
