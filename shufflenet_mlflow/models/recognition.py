"""Whether weights, and the module that they are of, are those of the network that their mark or their file names."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from shufflenet_mlflow.checkpoints.loading import AUXILIARY_PREFIX
from shufflenet_mlflow.checkpoints.plain import bare_key
from shufflenet_mlflow.models.loaded import classes_in
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.text import name_some


class Recognised(NamedTuple):
    """A network that weights are of."""

    spec: ModelSpec
    num_classes: int


class _Anatomy(NamedTuple):
    shapes: dict[str, tuple[int, ...]]
    layers: dict[str, str]


def recognise(
    name: str, kwargs: Mapping[str, Any], weights: Mapping[str, Tensor], module: nn.Module | None = None
) -> Recognised | str:
    """Return the network that `weights` are of, or why they are not those of the network `name`.

    Args:
        kwargs: further arguments of `create_model`.
        weights: by bare name; the number of classes follows from them.
        module: whose weights they are, if it is there: its layers are compared, too.

    Raises:
        ModelError: there is no such network.
    """
    spec = ModelSpec.of(name, **kwargs)
    num_classes = classes_in(weights, spec)
    expected = _expected(json.dumps([name, spec.kwargs()]), num_classes)
    found = {key: tuple(tensor.shape) if isinstance(tensor, Tensor) else None for key, tensor in weights.items()}
    without = {key for key in expected.shapes if not key.startswith(AUXILIARY_PREFIX) or spec.traits is not None}
    if missing := [key for key in without if key not in found]:
        return f"it lacks {name_some(sorted(missing))}"
    if unexpected := [key for key in found if key not in expected.shapes]:
        return f"{name_some(unexpected)} is new"
    if reshaped := [key for key in found if found[key] != expected.shapes[key]]:
        return f"{name_some(reshaped)} has another shape"
    if module is not None:
        layers = _layers(module)
        if others := [key for key in {**expected.layers, **layers} if layers.get(key) != expected.layers.get(key)]:
            return f"{name_some(others)} is another layer"
    return Recognised(spec, num_classes)


@lru_cache(maxsize=16)
def _expected(network: str, num_classes: int) -> _Anatomy:
    """Return names and shapes of a network's tensors, and its layers; building one takes tens of milliseconds."""
    name, kwargs = json.loads(network)
    module = ModelSpec.of(name, **kwargs).on_meta(num_classes)
    return _Anatomy({key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}, _layers(module))


def _layers(module: nn.Module) -> dict[str, str]:
    """Describe the layers that decide what a network computes, apart from its weights, by name.

    Batch normalisation may be converted or frozen, and dropout changed; linear layers are compared by their weights.
    """
    return {
        bare_key(name): type(layer).__name__ + (f"({_settings(layer)})" if isinstance(layer, _ConvNd) else "")
        for name, layer in module.named_modules()
        if not (
            list(layer.children())
            or isinstance(layer, (_BatchNorm, _DropoutNd, nn.Identity, nn.Linear))
            or name.startswith(AUXILIARY_PREFIX)
        )
    }


def _settings(layer: _ConvNd) -> str:
    return f"{layer.stride}, {layer.padding}, {layer.dilation}, {layer.groups}, {layer.padding_mode}"
