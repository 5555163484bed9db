"""Choose the device that a network runs on, and the memory layout of tensors there."""

import ctypes
import os
import platform
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


_CPUINFO = Path("/proc/cpuinfo")
_KIND = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
"""Linux's names for the maker and the kind of a processor: the first three on x86, the others on Arm."""


def processor() -> str:
    """Return the kind of the processor, such as `AuthenticAMD 25 17`.

    The libraries that PyTorch computes with choose their kernels by it, so that two kinds round differently even where
    both have the same instructions.
    """
    try:
        lines = (line.partition(":") for line in _CPUINFO.read_text("utf-8").partition("\n\n")[0].splitlines())
        found = {name.strip(): value.strip() for name, _, value in lines}
    except (OSError, UnicodeDecodeError):
        found = {}
    return " ".join(found[name] for name in _KIND if name in found) or platform.processor() or platform.machine()


def local_processes() -> int:
    """Return how many processes of this job share the machine, as torchrun says."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return max(1, int(local)) if local.isdecimal() else 1


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


def repeat_exactly(device: torch.device) -> None:
    """Let convolutions on an NVIDIA GPU give the same bits each time, as they do on a CPU.

    cuDNN otherwise chooses kernels that add up gradients in varying order: two runs with one seed then differ.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
