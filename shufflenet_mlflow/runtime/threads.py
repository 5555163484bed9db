"""The threads that PyTorch computes with on the CPU: how many, and how they wait for each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shufflenet_mlflow.runtime.devices import local_processes, usable_cores

MACS_PER_THREAD = 1e9
"""Multiply-accumulates of a forward pass from which a further thread is worth what it costs to wake and to wait for."""

_GIVEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_threads(macs: float) -> int:
    """Return how many threads to compute with, unless the environment says so.

    The answer depends on nothing that changes while a machine works, such as its load: results depend on the number of
    threads, in their last bits, and the same command must give the same result.

    Args:
        macs: multiply-accumulates of one forward pass.
    """
    if any(os.environ.get(name) for name in _GIVEN_BY):
        return torch.get_num_threads()
    cores = max(1, usable_cores() // local_processes())
    return max(1, min(cores, round(macs / MACS_PER_THREAD)))


@contextmanager
def threads_used(threads: int | None) -> Iterator[None]:
    """Compute with so many threads within the block, and with as many as before after it; None: no change."""
    before = torch.get_num_threads()
    if threads is not None and threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
