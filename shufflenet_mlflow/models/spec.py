"""Which network it is, by name and arguments, without its weights."""

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
"""Arguments of `create_model` that make another network of it."""


@dataclass(frozen=True)
class ModelSpec:
    """Which network it is, but for the width of its classifier; `of` makes equal ones equal."""

    name: str
    choices: Sequence[int] | None = None
    scales: Sequence[float] | None = None

    @classmethod
    def asked(cls, options: Mapping[str, Any]) -> "ModelSpec | None":
        """The network that the options `model`, `choices` and `scales` name; None where they name none.

        Raises:
            ConfigError: choices or scales are not numbers, or stand without a network.
            ModelError: there is no such network.
        """
        arguments = check_network({name: options.get(name) for name in ("model", *SPEC_ARGUMENTS)})
        model = options.get("model")
        return None if model is None else cls.of(model, **arguments)  # type: ignore[arg-type]

    @classmethod
    def of(cls, name: str, choices: Sequence[int] | None = None, scales: Sequence[float] | None = None) -> "ModelSpec":
        """The network, with choices and scales both or, where they are the published ones, neither.

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
        """Arguments of `create_model` besides name and number of classes."""
        given = {"choices": self.choices, "scales": self.scales}
        return {key: list(value) for key, value in given.items() if value is not None}

    def build(self, num_classes: int, *, pretrained: bool = False) -> nn.Module:
        """The network, with freshly drawn or published weights.

        Raises:
            ModelError: there is no such network.
            CheckpointError: the published weights could not be fetched, or cannot be used.
        """
        return create_model(self.name, num_classes, **self.kwargs(), pretrained=pretrained)


def fitting_models(weights: Mapping[str, Tensor]) -> list[str]:
    """The networks of the table that `weights` fit, but for the classifiers and auxiliary heads."""
    shapes = {(key, tuple(tensor.shape)) for key, tensor in weights.items()}
    return [name for name in VARIANTS if _body(name) <= shapes]


@cache
def _body(name: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of all but the heads."""
    with torch.device("meta"):
        model = create_model(name)
    head = head_of(model)
    return frozenset(
        (key, tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
        if not key.startswith(AUXILIARY_PREFIX) and key.rpartition(".")[0] != head
    )
