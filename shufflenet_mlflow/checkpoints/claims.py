"""Compare what a checkpoint's pickle claims about its tensors with the bytes that are there.

PyTorch believes the pickle: a storage with fewer bytes than claimed is read beyond its end. Nothing is loaded here, and
no code of the file runs: every name in the pickle stands for an object that does nothing.
"""

import collections
import pickle
from collections.abc import Mapping
from io import BytesIO
from typing import Any

LARGEST_PICKLE = 64 << 20
"""Bytes of a pickle, which holds all but the numbers of the tensors; that of a large network is below one MB."""

_BYTES = {
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
}
"""Bytes of an element; one for every other type."""


class FalseClaimError(Exception):
    """The pickle contradicts the bytes that are there; the message says how."""


class _Inert:
    def __new__(cls, *_arguments: Any, **_keywords: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _StorageType(_Inert):
    size = 1


class _Storage:
    def __init__(self, key: str, elements: int) -> None:
        self.key, self.elements = key, elements


def _check_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_more: Any) -> _Inert:
    if not isinstance(storage, _Storage):
        return _Inert()
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
        raise FalseClaimError(f"a tensor in storage {storage.key} has an impossible shape")
    if 0 not in size:
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= storage.elements:
            raise FalseClaimError(f"a tensor reaches beyond the end of its storage {storage.key}")
    return _Inert()


class _Reader(pickle._Unpickler):  # the one in C reserves whatever memory a pickle asks for
    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(BytesIO(data))
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _check_tensor
        if name.endswith("Storage"):
            return type(name, (_StorageType,), {"size": _BYTES.get(name, 1)})
        return _Inert

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, elements = pid
        if key not in self._sizes:
            raise FalseClaimError(f"the storage {key} is missing")
        if type(elements) is not int or elements < 0 or elements * kind.size > self._sizes[key]:
            raise FalseClaimError(
                f"its storage {key} has {self._sizes[key]} bytes, and its pickle claims {elements} x {kind.size}"
            )
        return _Storage(key, elements)


def check_claims(data: bytes, sizes: Mapping[str, int]) -> None:
    """Check every storage and tensor that a pickle names.

    Args:
        data: the pickle.
        sizes: the bytes of each storage, by its key.

    Raises:
        FalseClaimError: one does not fit.
    """
    try:
        _Reader(data, sizes).load()
    except FalseClaimError:
        raise
    except Exception:  # noqa: BLE001, S110 - not what torch.save writes: loading refuses it, and says why
        pass


class _Inattentive(_Reader):
    def find_class(self, module: str, name: str) -> Any:
        return collections.OrderedDict if (module, name) == ("collections", "OrderedDict") else _Inert

    def persistent_load(self, _pid: Any) -> _Storage:
        return _Storage("", 0)


def entries_without_tensors(data: bytes) -> dict[Any, Any]:
    """Return what a pickle holds besides its tensors, which are objects that do nothing; {} if it is no dict."""
    try:
        entries = _Inattentive(data, {}).load()
    except Exception:  # noqa: BLE001 - not what torch.save writes
        return {}
    return dict(entries) if isinstance(entries, dict) else {}
