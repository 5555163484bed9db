"""Choose the device that a network runs on, and the memory layout of tensors there."""

import ctypes
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from shufflenet_mlflow.errors import ConfigError


def choose_device(device: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `mps`, `cuda` or `cuda:N` names on this machine.

    Raises:
        ConfigError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"--device (={device}) must be auto, cpu, mps, cuda or cuda:N", code="device-unknown"
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu",
            code="cuda-missing",
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: there is no Apple GPU here; use auto or cpu", code="mps-missing")
    return chosen


def memory_format_on(device: torch.device) -> torch.memory_format:
    """Return channels last where convolutions are faster with it: on CPUs and on CUDA's tensor cores."""
    return torch.channels_last if device.type in ("cpu", "cuda") else torch.contiguous_format


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move `model` to `device`, in the memory format that suits the device."""
    return model.to(device=device, memory_format=memory_format_on(device))  # type: ignore[call-overload, no-any-return]


def move_images(images_NCHW: Tensor, device: torch.device) -> Tensor:
    """Move a batch of images, of any dtype, in the same way, without waiting for a copy from pinned memory."""
    return images_NCHW.contiguous(memory_format=memory_format_on(device)).to(device, non_blocking=True)


def usable_cores() -> int:
    """Return the cores that this process may use, which schedulers and containers can limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _quota() or cores)


_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time per period, and the period, that a container may use; `max` for no limit."""


def _quota() -> int | None:
    """Return a container's limit in whole cores; None if there is none."""
    try:
        allowed, period = _QUOTA.read_text("ascii").split()
        return max(1, round(int(allowed) / int(period)))
    except (OSError, ValueError):
        return None


def finish(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compiled(network: nn.Module) -> nn.Module:
    """Return `network` compiled by `torch.compile`, which happens with the first batch; PyTorch caches the result.

    Each batch size is compiled separately: whether PyTorch would compile one version for all sizes depends on the sizes
    that it has seen, and a resumed run has not seen the same ones.

    Raises:
        ConfigError: PyTorch cannot compile here at all.
    """
    try:
        return torch.compile(network, dynamic=False)  # type: ignore[return-value]
    except RuntimeError as error:
        raise ConfigError(
            f"--compile: {str(error).splitlines()[0]}; leave it out", code="compile-unavailable"
        ) from error


def compile_failure(error: RuntimeError) -> ConfigError | None:
    """Return the error to raise if `error` is a failure to compile; None for any other error."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(
        f"--compile: the network cannot be compiled here ({reason}); leave it out", code="compile-failed"
    )


def lack_of_memory(error: RuntimeError) -> ConfigError | None:
    """Return the error to raise if `error` says that memory ran out in training; None for any other error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:  # on a GPU, on a CPU
        return None
    return ConfigError(
        f"memory ran out ({text.splitlines()[0][:200]}); lower --batch-size, --input-size, or --micro-batch-size, "
        "which splits a batch",
        code="out-of-memory",
    )


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's `mallopt`, from its `malloc.h`."""


def keep_freed_memory(device: torch.device) -> None:
    """Let this process reuse the memory of CPU tensors instead of returning it after each operation.

    By default glibc returns blocks larger than 32 MiB at once, and the pages of each new tensor are then allocated and
    zeroed one by one, which can take as long as the arithmetic. Does nothing for other devices, or without glibc.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
