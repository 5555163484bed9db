"""Specs of networks: name and arguments, without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.loading import AUXILIARY_PREFIX, head_of
from shufflenet_mlflow.models.catalog import VARIANTS, check_network, create_model
from shufflenet_mlflow.models.search_space import complete

SPEC_ARGUMENTS = ("choices", "scales")
"""Arguments of `create_model` that change the network."""


@dataclass(frozen=True)
class ModelSpec:
    """A network's name and arguments, without its number of classes; `of` makes equal specs for equal networks."""

    name: str
    choices: Sequence[int] | None = None
    """As for `create_model`."""
    scales: Sequence[float] | None = None
    """As for `create_model`."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "ModelSpec | None":
        """Return the network that the options `model`, `choices` and `scales` name, or None if they name none.

        Raises:
            ConfigError: choices or scales are not numbers, or are given without a network.
            ModelError: there is no such network.
        """
        arguments = check_network({name: options.get(name) for name in ("model", *SPEC_ARGUMENTS)})
        model = options.get("model")
        return None if model is None else cls.of(model, **arguments)  # type: ignore[arg-type]

    @classmethod
    def of(cls, name: str, choices: Sequence[int] | None = None, scales: Sequence[float] | None = None) -> "ModelSpec":
        """Return the spec in its normal form: both choices and scales, or neither if they are the published ones.

        Raises:
            ModelError: there is no such network.
        """
        with torch.device("meta"):
            cls(name, choices, scales).build(1)
        if choices is None and scales is None:
            return cls(name)
        completed = complete(choices, scales)
        return cls(name) if completed == complete(None, None) else cls(name, *completed)

    def kwargs(self) -> dict[str, Any]:
        """Return the arguments of `create_model` besides name and number of classes."""
        given = {"choices": self.choices, "scales": self.scales}
        return {key: list(value) for key, value in given.items() if value is not None}

    def build(self, num_classes: int, *, pretrained: bool = False) -> nn.Module:
        """Build the network with freshly drawn or published weights.

        Raises:
            ModelError: there is no such network.
            CheckpointError: the published weights could not be downloaded, or cannot be used.
        """
        return create_model(self.name, num_classes, **self.kwargs(), pretrained=pretrained)


def fitting_models(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the networks of the catalog that `weights` fit, apart from classifier and auxiliary heads."""
    shapes = {(key, tuple(tensor.shape)) for key, tensor in weights.items()}
    return [name for name in VARIANTS if _body(name) <= shapes]


@cache
def _body(name: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of all tensors except the heads'."""
    with torch.device("meta"):
        model = create_model(name)
    head = head_of(model)
    return frozenset(
        (key, tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
        if not key.startswith(AUXILIARY_PREFIX) and key.rpartition(".")[0] != head
    )
