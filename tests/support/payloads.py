"""Contents of checkpoint files: compared exactly, or made to run code where they are unpickled."""

import os
from pathlib import Path
from typing import Any

import torch


def assert_equal_payloads(first: Any, second: Any, where: str = "payload") -> None:
    """Compare nested containers exactly: no tolerance, tensors included."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal_payloads(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal_payloads(one, other, f"{where}[{index}]")
    else:
        assert first == second or (first != first and second != second), where


class Hostile:
    """An object that creates the folder `marker` where it is unpickled, which no checkpoint may be able to do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)
