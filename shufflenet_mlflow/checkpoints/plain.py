"""What a checkpoint holds: plain containers, tensors on the CPU, bare parameter names."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.errors import CheckpointError

_WRAPPERS = ("module.", "_orig_mod.")

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def is_plain_tensor(value: Any) -> bool:
    """Whether `value` is a tensor of ordinary numbers, each of which is really there.

    A file can hold sparse, quantised and complex ones, and a small one that pretends to be of any size.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in _DTYPES
        and not value.is_meta
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def bare_key(key: str) -> str:
    """A parameter's name without what DataParallel, DDP and torch.compile put before it."""
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key.replace("._orig_mod.", ".")


def bare_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries under their bare names.

    Raises:
        CheckpointError: two entries have the same bare name.
    """
    bare = {bare_key(key): value for key, value in state_dict.items()}
    if len(bare) != len(state_dict):
        raise CheckpointError("two entries of the state dict differ only in their prefix", code="duplicate-bare-names")
    return bare


def compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; copied only if it is elsewhere, or a small view of a large storage."""
    plain = tensor.detach().cpu()
    if plain.layout == torch.strided and plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain


def to_plain(value: Any, where: str = "state", *, hold: Callable[[Tensor], Tensor] = compact) -> Any:
    """A copy of nested containers that `torch.load(weights_only=True)` can read anywhere.

    Tensors are detached and on the CPU; those that are a small view of a large storage are copied, so that the
    file holds only what is seen. One that has several names is stored once.

    Args:
        hold: what to put in the place of a tensor.

    Raises:
        CheckpointError: something in it is neither a tensor nor plain; the message says where.
    """
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def hold_once(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return hold(tensor)
        address = tensor.data_ptr()  # 0 for an empty one
        known = held.get(address) if address else None
        if known is not None and _are_one_view(known[0], tensor):
            return known[1]
        held[address] = tensor, hold(tensor)
        return held[address][1]

    try:
        return _plain(value, hold_once)
    except _NotPlainError:
        raise CheckpointError(_find_what_is_not_plain(value, where) or where, code="state-not-plain") from None


def _are_one_view(first: Tensor, second: Tensor) -> bool:
    """Of two tensors that begin at one address."""
    same = first.dtype == second.dtype and first.device == second.device
    return same and first.shape == second.shape and first.stride() == second.stride()


class _NotPlainError(Exception):
    """Says only that it is so: keeping track of where costs more than the copy of a small state."""


_PLAIN = {type(None), bool, int, float, str, bytes}


def _plain(value: Any, hold: Callable[[Tensor], Tensor]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return hold(value)
    if isinstance(value, Mapping):
        if any(not isinstance(key, (str, int)) for key in value):
            raise _NotPlainError
        return {key: _plain(item, hold) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, hold) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (bool, int, float, str)):  # subclasses, such as numpy.float64 or an enum
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    raise _NotPlainError


def _find_what_is_not_plain(value: Any, where: str) -> str | None:
    """A message about the first thing in `value` that is not plain; None if all is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                return f"{where} has the key {key!r}; keys must be text or integers"
            if message := _find_what_is_not_plain(item, f"{where}[{key!r}]"):
                return message
        return None
    if isinstance(value, (list, tuple)):
        found = (_find_what_is_not_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
        return next(filter(None, found), None)
    if value is None or isinstance(value, (Tensor, bool, int, float, str, bytes)):
        return None
    return (
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}; a checkpoint takes tensors, "
        "numbers, text, lists and dicts"
    )
