"""How much of the long tests runs: all, except in CI, where an attack is repeated less often and some are left out."""

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

IN_CI = os.environ.get("CI") == "true"
T = TypeVar("T")

only_in_full_run = pytest.mark.skipif(IN_CI, reason="only in the full run, without CI=true")
"""For tests that take long, and where another one shows nearly the same."""


def repetitions(*, full: int, ci: int) -> int:
    """Return `ci` where the environment has `CI=true`, and `full` everywhere else."""
    return ci if IN_CI else full


def cases(values: Sequence[T], *, ci: int) -> list[T]:
    """Return the values; the first `ci` of them where the environment has `CI=true`."""
    return list(values[:ci] if IN_CI else values)
