"""Digests of exported files: of the whole file, and of its weights and settings, which the file itself states."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS_KEY = "weights_sha256"
"""Entry of a file's settings: SHA-256 of the weights that it was written with."""
SETTINGS_KEY = "settings_sha256"
"""Entry of a file's settings: SHA-256 of the other entries."""


def sealed(settings: Mapping[str, Any], weights_sha256: str) -> str:
    """Return the settings as JSON, with the digest of the weights and their own."""
    entries = {**settings, WEIGHTS_KEY: weights_sha256}
    return json.dumps({**entries, SETTINGS_KEY: sha256_of_settings(entries)})


def sha256_of_settings(settings: Mapping[str, Any]) -> str:
    """Return the digest of a file's settings, except for the entry that states it."""
    entries = {name: value for name, value in settings.items() if name != SETTINGS_KEY}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def sha256_of_onnx(model: Any) -> str:
    """Return the digest of an ONNX model's operations and numbers, whatever its metadata say."""
    from onnx import numpy_helper

    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}{list(tensor.dims)}{tensor.data_type}".encode())
        digest.update(numpy_helper.to_array(tensor).tobytes())
    for node in model.graph.node:
        digest.update(f"{node.op_type}{list(node.input)}{list(node.output)}".encode())
        for attribute in node.attribute:
            digest.update(attribute.SerializeToString(deterministic=True))
    return digest.hexdigest()


def sha256_of_program(program: Any) -> str:
    """Return the digest of the tensors of an exported program of PyTorch."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in (*sorted(program.state_dict.items()), *sorted(program.constants.items())):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def stored_weights(path: Path) -> Path | None:
    """Return the file of weights that belongs to an `.xml`; None for the other formats, which are one file."""
    return path.with_suffix(".bin") if path.suffix.lower() == ".xml" else None


def sha256_of_stored_weights(path: Path) -> str:
    """Return the digest of the file of weights that belongs to an `.xml`."""
    return hashlib.sha256(path.with_suffix(".bin").read_bytes()).hexdigest()


def sha256_of_export(path: Path) -> str:
    """Return the SHA-256 of an exported file; of an `.xml`, of its bytes followed by those of its weights."""
    digest = hashlib.sha256(path.read_bytes())
    weights = stored_weights(path)
    if weights is not None:
        digest.update(weights.read_bytes())
    return digest.hexdigest()


def size_of_export(path: Path) -> int:
    """Return the bytes of an exported file, with its weights."""
    weights = stored_weights(path)
    return path.stat().st_size + (weights.stat().st_size if weights is not None else 0)
