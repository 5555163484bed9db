"""Loading of networks from checkpoints, this project's and others'.

This project's checkpoints describe their network, input and classes. Those of the original release hold weights only:
the user names the network, and the width of the classifier follows from the weights.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.loading import head_of, load_checkpoint, weights_of
from shufflenet_mlflow.checkpoints.marks import mark_of, set_mark
from shufflenet_mlflow.checkpoints.schema import check_payload, is_own
from shufflenet_mlflow.data.mean import read_mean_image
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.errors import CheckpointError, ConfigError, MismatchError, ModelError
from shufflenet_mlflow.models.catalog import VARIANTS, check_network, find_network
from shufflenet_mlflow.models.entry_points import Registration
from shufflenet_mlflow.models.spec import INT8, QUANTIZATION, SPEC_ARGUMENTS, ModelSpec, fitting_models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelDescription:
    """Description of a checkpoint's network; entries that the file lacks are None."""

    spec: ModelSpec | None
    preprocess: Preprocess | None
    class_to_idx: Mapping[str, int] | None


def describe(payload: Mapping[str, Any], source: str) -> ModelDescription:
    """Return the description of a checkpoint's network.

    Args:
        payload: the result of `read_checkpoint`.
        source: what to call it in messages.

    Raises:
        CheckpointError: an entry is invalid.
    """
    if not is_own(payload):
        return ModelDescription(None, None, None)
    check_payload(payload, ("state_dict",), source)
    return ModelDescription(
        spec=_spec_from(payload["model"], source) if "model" in payload else None,
        preprocess=Preprocess.from_dict(payload["preprocess"], source) if "preprocess" in payload else None,
        class_to_idx=payload.get("class_to_idx"),
    )


def _spec_from(model: Mapping[str, Any], source: str) -> ModelSpec:
    name, kwargs = model["name"], {key: value for key, value in model["kwargs"].items() if key != "num_classes"}
    _require_known(name, model.get("package"), source)
    if name in VARIANTS:
        if unknown := sorted(set(map(str, kwargs)) - set(SPEC_ARGUMENTS)):
            raise CheckpointError(
                f"{source}: its network has the unknown arguments {unknown}",
                code="model-arguments-unknown",
            )
        if not all(isinstance(value, (list, tuple)) for value in kwargs.values()):
            raise CheckpointError(f"{source}: its network's arguments are not lists", code="model-arguments-not-lists")
    quantization = model.get(QUANTIZATION)
    if quantization not in (None, INT8):
        raise CheckpointError(
            f"{source}: its network rounds as {quantization!r}, which is not known here; upgrade this package",
            code="quantization-unknown",
        )
    try:
        return replace(ModelSpec.of(name, **kwargs), fake_quantized=quantization is not None)
    except (ModelError, TypeError) as error:
        raise CheckpointError(
            f"{source}: its network cannot be built: {error}", code="model-entry-unbuildable"
        ) from error


@cache
def _warn_of_other_package(name: str, then: str, now: str) -> None:
    logger.warning(
        "the network %r was that of %s when its checkpoint was written, and is that of %s here; it may compute "
        "something else",
        name,
        then,
        now,
    )


def _require_known(name: str, package: object, source: str) -> None:
    """Raise CheckpointError if the package that registered the network is not installed here; warn of another one."""
    try:
        found = find_network(name)
        if isinstance(found, Registration) and isinstance(package, str) and package != found.package:
            _warn_of_other_package(name, package, found.package)
    except ModelError as error:
        if error.code != "model-unknown" or not isinstance(package, str):
            raise CheckpointError(
                f"{source}: its network cannot be built: {error}", code="checkpoint-network-unknown"
            ) from error
        raise CheckpointError(
            f"{source} holds the network {name!r}, which no package registers here; {package} did when it was written: "
            "install that",
            code="model-not-registered",
        ) from error


def identify(
    described: ModelSpec | None, requested: ModelSpec | None, payload: Mapping[str, Any], source: str
) -> ModelSpec:
    """Return the network that the checkpoint or the user names.

    Args:
        described: the checkpoint's, if it names one.
        requested: the user's, if they named one.
        payload: the result of `read_checkpoint`.
        source: what to call it in messages.

    Raises:
        CheckpointError: the weights are those of a network without a classifier.
        ConfigError: neither names one, or they differ.
    """
    if described is None:
        if requested is not None:
            return requested
        weights = weights_of(payload, source)
        fitting = fitting_models(weights)
        for name in fitting:
            _require_classifier(weights, ModelSpec(name), source)
        if not fitting and is_own(payload):
            raise ConfigError(
                f"{source} holds a network that this command does not know: it needs one that `create_model` makes, or "
                "that a package registers (see `shufflenet models`); if it is one of those, pass --model NAME",
                code="network-not-known",
            )
        hint = f"it fits --model {' or '.join(fitting)}" if fitting else "pass --model NAME (see `shufflenet models`)"
        raise ConfigError(f"{source} does not name its network; {hint}", code="model-not-named")
    if requested is None or requested in (replace(described, fake_quantized=False), ModelSpec(described.name)):
        return described
    if requested.name != described.name:
        raise ConfigError(
            f"{source} holds {described.name}, not --model {requested.name}; leave --model out", code="model-differs"
        )
    raise ConfigError(
        f"{source} holds {described.name} with other choices or scales; leave --choices and --scales out",
        code="model-arguments-differ",
    )


@contextmanager
def suggest_fitting_models(weights: Mapping[str, Tensor], source: str, spec: ModelSpec) -> Iterator[None]:
    """Name the networks that `weights` do fit if the block fails to load them into `spec`.

    Raises:
        MismatchError: raised by the block; if other networks fit, the message names those instead of tensors.
    """
    try:
        yield
    except MismatchError as error:
        fitting = [name for name in fitting_models(weights) if name != spec.name]
        if not fitting:
            raise
        raise MismatchError(
            f"{source} does not fit {spec.name}; it fits --model {' or '.join(fitting)}",
            error.report,
            code="model-does-not-fit",
        ) from error


def classes_in(weights: Mapping[str, Tensor], spec: ModelSpec) -> int:
    """Return the width of the classifier in `weights`; 1000 if they have none."""
    traits = spec.traits
    head = head_of(spec.on_meta(1)) if traits is None else traits.head
    weight = weights.get(f"{head}.weight")
    return 1000 if weight is None or not weight.dim() or not len(weight) else len(weight)


def _require_classifier(weights: Mapping[str, Tensor], spec: ModelSpec, source: str) -> None:
    """Raise CheckpointError for the weights of a network that was built with `num_classes=0`."""
    traits = spec.traits
    head = head_of(spec.on_meta(1)) if traits is None else traits.head
    if f"{head}.weight" not in weights and spec.name in fitting_models(weights):
        raise CheckpointError(
            f"{source} holds the features of {spec.name} without a classifier (num_classes=0); name a checkpoint with "
            "one",
            code="no-classifier",
        )


@dataclass(frozen=True)
class LoadedModel:
    """A network with its weights, preprocessing and classes."""

    module: nn.Module
    spec: ModelSpec
    num_classes: int
    preprocess: Preprocess
    class_to_idx: Mapping[str, int] | None
    """Class name -> label; None if the checkpoint does not name its classes."""

    @property
    def labels(self) -> list[str]:
        """Name of each output; its index if the checkpoint gives it no name."""
        return label_outputs({index: name for name, index in (self.class_to_idx or {}).items()}, self.num_classes)


def label_outputs(names: Mapping[int, str], outputs: int) -> list[str]:
    """Return a distinct label for each of a network's outputs: its class, or else its index."""
    taken = set(names.values())
    fallbacks = (f"output {index}" if str(index) in taken else str(index) for index in range(outputs))
    return [names.get(index, label) for index, label in enumerate(fallbacks)]


def model_from_payload(
    payload: Mapping[str, Any],
    source: str,
    *,
    requested: ModelSpec | None = None,
    input_size: int | None = None,
    mean_image: str | None = None,
) -> LoadedModel:
    """Build a checkpoint's network with its weights, on the CPU.

    Args:
        payload: the result of `read_checkpoint`.
        source: what to call it in messages.
        requested: the network that the user named; needed if the checkpoint names none.
        input_size: pixels; by default the checkpoint's, or the network's usual one.
        mean_image: a file; by default the checkpoint's mean image, if it has one.

    Raises:
        ConfigError: neither the checkpoint nor the user names the network, or they differ; or see `choose_preprocess`.
        CheckpointError: its weights do not fit the network, or an entry is invalid.
        DataError: the mean image cannot be read.
    """
    described = describe(payload, source)
    spec = identify(described.spec, requested, payload, source)
    weights = weights_of(payload, source)
    _require_classifier(weights, spec, source)
    num_classes = classes_in(weights, spec)
    usual = described.preprocess or spec.preprocess
    preprocess = choose_preprocess(
        spec,
        input_size if input_size is not None else usual.input_size,
        mean_image=mean_image,
        stored=described.preprocess,
        reading=usual.reading,
    )
    module = spec.build(num_classes)
    with suggest_fitting_models(weights, source, spec):
        load_checkpoint(module, weights, strict=False, source=source)
    set_mark(module, {**(mark_of(module) or {}), "preprocess": preprocess.to_dict()})  # for what is trained further
    return LoadedModel(module, spec, num_classes, preprocess, described.class_to_idx)


def choose_preprocess(
    spec: ModelSpec,
    input_size: int,
    *,
    mean_image: str | None = None,
    stored: Preprocess | None = None,
    reading: Reading = Reading(),  # noqa: B008 - immutable
) -> Preprocess:
    """Return the network's preprocessing at `input_size`.

    Args:
        mean_image: a file; by default the one in `stored`.
        stored: the checkpoint's preprocessing, if it has one.
        reading: how files are read, unless `stored` says it.

    Raises:
        ConfigError: the network takes no mean image, or its size is not the input size.
        DataError: the mean image cannot be read.
    """
    mode = stored.mode if stored is not None else spec.preprocess.mode
    reading = stored.reading if stored is not None else reading
    if mean_image is None:
        mean = stored.mean_image if stored is not None else None
        return Preprocess(mode, input_size, mean, reading)
    check_network({"model": spec.name, "mean_image": mean_image})
    return Preprocess(mode, input_size, read_mean_image(Path(mean_image)), reading)
