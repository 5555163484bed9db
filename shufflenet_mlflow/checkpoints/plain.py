"""Conversion of a state to what a checkpoint holds: plain containers, tensors on the CPU, bare parameter names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.names import LARGEST_COUNT
from shufflenet_mlflow.errors import CheckpointError

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel, DDP and torch.compile put before a parameter's name."""

AVERAGE_COUNT = "n_averaged"
"""Entry of PyTorch's AveragedModel beside the weights."""

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def is_plain_tensor(value: Any) -> bool:
    """Whether `value` is a dense tensor of ordinary numbers, all of them in its storage.

    A file can hold sparse, quantised and complex tensors, and a small one that claims any size.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in _DTYPES
        and not value.is_meta
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def plain_number(value: Any, name: str) -> float | None:
    """Return a number out of Python's own types, of numpy's or in a tensor with one element; None for None.

    Args:
        name: what to call it in messages.

    Raises:
        CheckpointError: it is something else.
    """
    is_single = isinstance(value, Tensor | np.generic | np.ndarray) and value.ndim == 0
    number = value.item() if is_single else value
    if not isinstance(number, (int, float, type(None))):
        raise CheckpointError(f"{name} is {_shown(value)}; give a number", code="value-not-number")
    if isinstance(number, int) and abs(number) > LARGEST_COUNT:
        raise CheckpointError(f"{name} is beyond {LARGEST_COUNT:.0e}; give a smaller number", code="value-too-large")
    return number


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = f"a {type(value).__name__}"
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"


class OwnNames(dict[str, Any]):
    """The state dict of a module that nothing wraps, whose names may begin as those of wrapped ones do."""


def bare_key(key: str) -> str:
    """Return a parameter's name without the prefixes of DataParallel, DDP and torch.compile."""
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return _without_compiler(key)


def _without_compiler(key: str) -> str:
    """Return a parameter's name without what torch.compile puts into it where it wraps a part of the network."""
    return key.replace("._orig_mod.", ".")


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the bare names of a state dict's entries, by name.

    A prefix is a wrapper's if every entry has it, apart from the counter of an AveragedModel; otherwise it is the name
    of a part of the network.
    """
    names = {key: key for key in keys}
    while (named := names.keys() - {AVERAGE_COUNT}) and any(
        all(names[key].startswith(wrapper) for key in named) for wrapper in _WRAPPERS
    ):
        names |= {key: names[key].partition(".")[2] for key in named}
    return {key: _without_compiler(name) for key, name in names.items()}


def bare_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same entries under their bare names.

    Raises:
        CheckpointError: two entries have the same bare name.
    """
    is_own = isinstance(state_dict, OwnNames)
    names = {key: _without_compiler(key) for key in state_dict} if is_own else bare_names(state_dict)
    by_name: dict[str, str] = {}
    for key, name in names.items():
        if name in by_name:
            raise CheckpointError(
                f"two entries of the state dict differ only in their prefix, {by_name[name]!r} and {key!r}",
                code="duplicate-bare-names",
            )
        by_name[name] = key
    return {name: state_dict[key] for name, key in by_name.items()}


def compact(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, copied only if it is on another device or a small view of a large storage."""
    plain = tensor.detach().cpu()
    if plain.layout == torch.strided and plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain


def to_plain(value: Any, where: str = "state", *, convert: Callable[[Tensor], Tensor] = compact) -> Any:
    """Copy nested containers into a form that `torch.load(weights_only=True)` can read anywhere.

    A tensor that occurs several times is converted once, and so stored once.

    Args:
        where: what to call `value` in messages.
        convert: applied to each tensor.

    Raises:
        CheckpointError: something in it is neither a tensor nor plain; the message says where.
    """
    converted: dict[int, tuple[Tensor, Tensor]] = {}

    def convert_once(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return convert(tensor)
        address = tensor.data_ptr()  # 0 for an empty tensor
        known = converted.get(address) if address else None
        if known is not None and _is_same_view(known[0], tensor):
            return known[1]
        converted[address] = tensor, convert(tensor)
        return converted[address][1]

    try:
        return _plain(value, convert_once)
    except RecursionError:
        raise too_deep(where) from None
    except _NotPlainError:
        raise CheckpointError(_describe_not_plain(value, where) or where, code="state-not-plain") from None


def too_deep(where: str) -> CheckpointError:
    """Return the error for a state that is nested too deeply."""
    return CheckpointError(
        f"{where} holds lists or dicts that are nested too deeply, or in themselves", code="state-too-deep"
    )


def _is_same_view(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors that begin at one address are equal in type and shape."""
    same = first.dtype == second.dtype and first.device == second.device
    return same and first.shape == second.shape and first.stride() == second.stride()


class _NotPlainError(Exception):
    """Holds no path: tracking where we are costs more than copying a small state."""


_PLAIN = {type(None), bool, int, float, str, bytes}


def _plain(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        if value.is_meta or _is_subclass(value):
            raise _NotPlainError
        return convert(value)
    if isinstance(value, Mapping):
        if any(not isinstance(key, (str, int)) for key in value):
            raise _NotPlainError
        return {key: _plain(item, convert) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, convert) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    if isinstance(value, (bool, int, float, str)):  # subclasses, such as numpy.float64 or an enum
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    raise _NotPlainError


def _is_subclass(tensor: Tensor) -> bool:
    """Whether a tensor, or what a parameter holds, is of a class of its own, which no file is allowed to name."""
    return type(tensor) not in (Tensor, nn.Parameter) or type(tensor.detach()) is not Tensor


def _describe_not_plain(value: Any, where: str) -> str | None:
    """Return a message about the first thing in `value` that is not plain, or None if everything is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                return f"{where} has the key {key!r}; keys must be text or integers"
            if message := _describe_not_plain(item, f"{where}[{key!r}]"):
                return message
        return None
    if isinstance(value, (list, tuple)):
        messages = (_describe_not_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
        return next(filter(None, messages), None)
    if isinstance(value, Tensor) and value.is_meta:
        return f"{where} is a tensor on the device meta, which has no values"
    if isinstance(value, Tensor) and _is_subclass(value):
        kind = type(value.detach())
        return (
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which is more than a tensor; a checkpoint takes "
            "plain ones, as .as_subclass(torch.Tensor) makes them"
        )
    if value is None or isinstance(value, (Tensor, bool, int, float, str, bytes)):
        return None
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return None
    return (
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}; a checkpoint takes tensors, "
        "numbers, text, lists and dicts"
    )
