"""Build the networks that other packages register, and find out about them what their checkpoints need.

An entry point's object is a function `build(num_classes, **arguments)` that returns a module with random weights, from
(N, 3, H, W) float images to (N, num_classes) logits, and its preprocessing; see `preprocess_from`. That of a prefix is
also given `name`, the rest of the network's name. One that takes `pretrained` is asked for its weights by
`--pretrained`.
"""

import contextlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shufflenet_mlflow.checkpoints.marks import Mark
from shufflenet_mlflow.data.preprocess import Preprocess, preprocess_from
from shufflenet_mlflow.errors import ConfigError, ModelError
from shufflenet_mlflow.models.auxiliary import OUTPUTS_IN_TRAINING
from shufflenet_mlflow.models.entry_points import Registration


@dataclass(frozen=True)
class Traits:
    """A registered network without its weights."""

    preprocess: Preprocess
    head: str
    """Name of the classifier: the last layer whose weight has a row for each class."""
    class_layers: tuple[str, ...]
    """Names of all layers whose shapes depend on the number of classes."""


def plain_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as a checkpoint gives them back.

    Raises:
        ModelError: one is not plain.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the arguments of {name} (={dict(arguments)!r}) must be numbers, text, lists and dicts: checkpoints hold "
            "them",
            code="model-arguments-not-plain",
        ) from error
    return plain


def build_registered(
    registration: Registration, name: str, num_classes: int, arguments: Mapping[str, Any], *, pretrained: bool = False
) -> tuple[nn.Module, Preprocess]:
    """Build the network `name` with the function of its entry point.

    Raises:
        ModelError: the function cannot be imported, does not take these arguments, fails, or returns something else
            than a module and its preprocessing.
    """
    function = _load(registration)
    given = {**arguments, **({"name": name.removeprefix(registration.name)} if registration.is_prefix else {})}
    if pretrained:
        given["pretrained"] = True
    _check_takes(function, registration, name, given)
    with _blamed(registration, "fails to build"):
        built = function(num_classes, **given)
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise ModelError(
            f"{registration} returns {_shown(built)}; it must return a module and its preprocessing, such as "
            "(module, 'rgb_256')",
            code="registered-returns",
        )
    if any(map(is_lazy, (*built[0].parameters(), *built[0].buffers()))):
        raise ModelError(
            f"{registration} has lazy layers, whose shapes only the first images would decide; give them their sizes",
            code="registered-lazy",
        )
    try:
        return built[0], preprocess_from(built[1], "its preprocessing")
    except ConfigError as error:
        raise ModelError(f"{registration}: {error}", code="registered-preprocess") from error


def build_marked(
    registration: Registration, name: str, num_classes: int, arguments: Mapping[str, Any], *, pretrained: bool = False
) -> tuple[nn.Module, Mark]:
    """Build a network, and return it with the mark that it is to have; see `build_registered`."""
    plain = plain_arguments(name, arguments)
    traits = traits_of(registration, name, plain)
    module, preprocess = build_registered(registration, name, num_classes, plain, pretrained=pretrained)
    return module, {
        "name": name,
        "kwargs": plain,
        "package": registration.package,
        "head": traits.head,
        "class_layers": list(traits.class_layers),
        "preprocess": preprocess.to_dict(),
    }


def takes_pretrained(registration: Registration) -> bool:
    """Whether a network's function has an argument `pretrained`."""
    try:
        return "pretrained" in inspect.signature(_load(registration)).parameters
    except (TypeError, ValueError):
        return False


@cache
def _load(registration: Registration) -> Callable[..., Any]:
    with _blamed(registration, "cannot be imported"):
        function = registration.entry.load()
    if not callable(function):
        raise ModelError(
            f"{registration} is {_shown(function)}, not a function that builds a network", code="registered-no-function"
        )
    found: Callable[..., Any] = function
    return found


def _check_takes(function: Callable[..., Any], registration: Registration, name: str, given: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function in C
        return
    try:
        signature.bind(1, **given)
    except TypeError as error:
        raise ModelError(
            f"{registration} cannot be called with num_classes{''.join(f', {key}' for key in given)}: {error}",
            code="registered-arguments",
        ) from error


@contextlib.contextmanager
def _blamed(registration: Registration, what: str) -> Iterator[None]:
    """Turn whatever the code of another package raises into one line; its output goes to stderr.

    Raises:
        ModelError: the block has raised something.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise ModelError(f"{registration} {what}: {reason}", code="registered-fails") from error


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return f"a {type(value).__name__}"


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random numbers of PyTorch on the CPU, numpy and Python as they were before the block."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def build_on_meta(
    registration: Registration, name: str, num_classes: int, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocess]:
    """Build a network without memory for its weights, or on the CPU if that fails; see `build_registered`."""
    with random_state_kept():
        try:
            with torch.device("meta"):
                module, preprocess = build_registered(registration, name, num_classes, arguments)
        except ModelError:
            with torch.device("cpu"):
                module, preprocess = build_registered(registration, name, num_classes, arguments)
        return module.to("meta"), preprocess


def traits_of(registration: Registration, name: str, arguments: Mapping[str, Any]) -> Traits:
    """Return what is known of a network without its weights; results are cached.

    Raises:
        ModelError: see `build_registered`; or no layer has a row for each class.
    """
    return _traits(registration, name, json.dumps(arguments))


@lru_cache(maxsize=64)
def _traits(registration: Registration, name: str, arguments: str) -> Traits:
    few, many = 2, 3
    module, preprocess = build_on_meta(registration, name, few, json.loads(arguments))
    wider, _ = build_on_meta(registration, name, many, json.loads(arguments))
    shapes, wide_shapes = ({key: tensor.shape for key, tensor in net.state_dict().items()} for net in (module, wider))
    changed = [key for key, shape in shapes.items() if wide_shapes.get(key) != shape]
    heads = [
        key.removesuffix(".weight")
        for key in changed
        if key.endswith(".weight") and shapes[key][0] == few and wide_shapes.get(key, (0,))[0] == many
    ]
    if not heads or shapes.keys() != wide_shapes.keys():
        raise ModelError(
            f"{registration}: no layer of {name} has a weight with num_classes rows, which would be its classifier",
            code="registered-without-head",
        )
    layers = dict.fromkeys(key.rpartition(".")[0] for key in changed)
    return Traits(preprocess, heads[-1], tuple(layers))


def check_runs(registration: Registration, name: str, arguments: Mapping[str, Any], input_size: int) -> None:
    """Try a network on the CPU with two images of `input_size` pixels, in evaluation and in training.

    It is built for that: without memory for its weights, neither strides nor values are what they will be.

    Raises:
        ModelError: it fails, or returns something else than logits.
    """
    images, classes = 2, 3  # as few images as batch normalisation takes
    with random_state_kept(), torch.no_grad():
        module, _ = build_registered(registration, name, classes, arguments)
        module = module.to(memory_format=torch.channels_last)
        images_NCHW = torch.zeros(images, 3, input_size, input_size).to(memory_format=torch.channels_last)
        for training in (False, True):
            doing = f"{input_size}x{input_size} pixels, channels last, in {'training' if training else 'evaluation'}"
            with _blamed(registration, f"fails on images of {doing}"):
                outputs = module.train(training)(images_NCHW)
            several = outputs if training and isinstance(outputs, tuple) else (outputs,)
            if len(several) not in (1, OUTPUTS_IN_TRAINING) or not all(
                isinstance(logits, Tensor) and logits.shape == (images, classes) for logits in several
            ):
                raise ModelError(
                    f"{registration} returns {_described(outputs)} for {images} images of {doing}, and {classes} "
                    f"classes; it must return logits of shape ({images}, {classes})",
                    code="registered-outputs",
                )


def _described(outputs: object) -> str:
    return f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else _shown(outputs)
