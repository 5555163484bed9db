"""Say where the time of a training step goes, operator by operator, for the plain loop and for ours.

    python benchmarks/profile_step.py [--device auto] [--models NAME ...] [--steps 3]

Milliseconds per step in the operators themselves, as torch.profiler measures them (which costs a little time), grouped
by what they do; images are in memory, and floors are measured, as in `training.py`. Prints JSON.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import add_device, apart, choose_device, describe, report
from photographs import write_photographs
from torch.profiler import ProfilerActivity, profile
from training import CLASSES, FAMILIES, batch_of, floors, rates, stepper

GROUPS = {
    "convolution": ("conv", "mkldnn_convolution"),
    "batch normalisation": ("batch_norm",),
    "activation": ("relu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "clamp"),
    "copies (split, shuffle, concatenation)": ("copy_", "cat", "add_", "index", "contiguous", "clone"),
    "optimizer": ("_fused_sgd", "_foreach", "optimizer"),
}


def group_of(operator: str) -> str:
    """Return what an operator does."""
    name = operator.removeprefix("aten::")
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "the rest")


def measure(side: str, model: str, root: Path, device: torch.device, steps: int) -> dict[str, float]:
    """Return the milliseconds per step of each group."""
    step: Callable[[], None] = stepper(side, model, root, device, batch_of(model, device))
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for _ in range(steps):
            step()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[group_of(event.key)] += spent / 1e3 / steps
    return {group: round(time, 1) for group, time in times.most_common()}


def main() -> None:
    """Profile both sides of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        side, model, folder, device_name, steps = given.measure
        print(json.dumps(measure(side, model, Path(folder), torch.device(device_name), int(steps))))
        return
    device = choose_device(given.device)
    speed = rates(device)
    networks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), CLASSES, 80)
        for model in given.models:
            batch = batch_of(model, device)
            arguments = (model, folder, device.type, given.steps)
            networks[model] = {
                "batch": batch,
                "milliseconds": {side: apart(__file__, side, *arguments) for side in ("plain", "ours")},
                **floors(model, batch, speed),
            }
    report({**describe(device), "networks": networks})


if __name__ == "__main__":
    main()
