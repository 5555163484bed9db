"""Describe the machine, and run measurements in processes of their own; used by every benchmark."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Return the date, the hardware and the versions."""
    described = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device is not None and device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def choose_device(name: str) -> torch.device:
    """Return the device; `auto` is the first GPU, or the CPU without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which all measurements of networks take."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def finish(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def apart(script: str, *words: object, cwd: str | None = None) -> Any:
    """Run `script --measure WORDS` in a process of its own; return the JSON that it prints."""
    command = [sys.executable, os.path.abspath(script), "--measure", *map(str, words)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=cwd)
    return json.loads(ran.stdout.splitlines()[-1])


def report(results: dict[str, Any]) -> None:
    """Print the results as JSON."""
    print(json.dumps(results, indent=2))
