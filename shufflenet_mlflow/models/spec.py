"""Specs of networks: name and arguments, without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.loading import AUXILIARY_PREFIX, head_of
from shufflenet_mlflow.data.preprocess import REFERENCE_SIZE, Preprocess
from shufflenet_mlflow.data.reading import READING_0_1
from shufflenet_mlflow.models.catalog import (
    VARIANTS,
    Variant,
    check_arguments,
    check_network,
    create_model,
    find_network,
)
from shufflenet_mlflow.models.entry_points import Registration
from shufflenet_mlflow.models.fake_quantize import fake_quantize
from shufflenet_mlflow.models.registered import Traits, build_on_meta, plain_arguments, traits_of
from shufflenet_mlflow.models.search_space import CHANNEL_SUPERNET, SUPERNETS, complete

QUANTIZATION, INT8 = "quantization", "int8"
"""Key, in the entry `model` of a checkpoint, of how its network rounds, and the value for fake quantisation."""

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
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a network that another package registers; plain values."""
    fake_quantized: bool = False
    """Its layers round as an int8 runtime does; see `fake_quantize`."""

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
    def of(
        cls,
        name: str,
        choices: Sequence[int] | None = None,
        scales: Sequence[float] | None = None,
        **arguments: Any,
    ) -> "ModelSpec":
        """Return the spec in its normal form: both choices and scales, or neither if they are the published ones.

        Raises:
            ModelError: there is no such network, or it does not take these arguments.
        """
        network = find_network(name)
        given = {key: value for key, value in (("choices", choices), ("scales", scales)) if value is not None}
        if isinstance(network, Registration):
            check_arguments(network, given)
            spec = cls(name, arguments=plain_arguments(name, arguments))
            traits_of(network, name, spec.arguments)
            return spec
        check_arguments(network, {**given, **arguments})
        with torch.device("meta"):
            cls(name, choices, scales).build(1)
        if choices is None and scales is None:
            return cls(name)
        completed = complete(choices, scales)
        return cls(name) if completed == complete(None, None) else cls(name, *completed)

    @property
    def network(self) -> Variant | Registration:
        """Its row of the table, or its entry point.

        Raises:
            ModelError: there is no such network.
        """
        return find_network(self.name)

    @property
    def is_supernet(self) -> bool:
        """Whether it stands for many networks, of which each iteration of training takes one."""
        return self.name in SUPERNETS

    @property
    def has_widths(self) -> bool:
        """Whether these networks have widths of their own."""
        return self.name == CHANNEL_SUPERNET

    @property
    def traits(self) -> Traits | None:
        """Input and classifier of a network that another package registers; None for those of the table."""
        network = self.network
        return traits_of(network, self.name, self.arguments) if isinstance(network, Registration) else None

    @property
    def preprocess(self) -> Preprocess:
        """The input that the network expects by default, with files read as torchvision's `ImageFolder` does."""
        if (traits := self.traits) is not None:
            return traits.preprocess
        return Preprocess(VARIANTS[self.name].preprocess, REFERENCE_SIZE, reading=READING_0_1)

    def kwargs(self) -> dict[str, Any]:
        """Return the arguments of `create_model` besides name and number of classes."""
        given = {"choices": self.choices, "scales": self.scales}
        return {**{key: list(value) for key, value in given.items() if value is not None}, **self.arguments}

    def to_entry(self, num_classes: int) -> dict[str, Any]:
        """Return the entry `model` of its checkpoints."""
        network = self.network
        package = {"package": network.package} if isinstance(network, Registration) else {}
        rounding = {QUANTIZATION: INT8} if self.fake_quantized else {}
        return {"name": self.name, "kwargs": {"num_classes": num_classes, **self.kwargs()}, **package, **rounding}

    def on_meta(self, num_classes: int) -> nn.Module:
        """Build the network without memory for its weights."""
        network = self.network
        if isinstance(network, Registration):
            model = build_on_meta(network, self.name, num_classes, self.arguments)[0]
            return fake_quantize(model) if self.fake_quantized else model
        with torch.device("meta"):
            return self.build(num_classes)

    def build(self, num_classes: int, *, pretrained: bool = False) -> nn.Module:
        """Build the network with freshly drawn or published weights.

        Raises:
            ModelError: there is no such network.
            CheckpointError: the published weights could not be downloaded, or cannot be used.
        """
        model = create_model(self.name, num_classes, **self.kwargs(), pretrained=pretrained)
        return fake_quantize(model) if self.fake_quantized else model


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
