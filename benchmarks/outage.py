"""Measure how much an outage of the tracking server slows the training loop.

Trains the same small network three times with a real `mlflow server`: undisturbed, with the server killed in the
middle, and with the server stopped (SIGSTOP) in the middle. Prints JSON with the times of the steps, and how much
longer the slowest step was than in the undisturbed run:

    PYTHONPATH=. python benchmarks/outage.py
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows.train import run_training
from shufflenet_mlflow.workflows.training.request import TrainRequest
from tests.support.mlflow_server import Server

ITERATIONS = 400
OUTAGE = (100, 300)
"""Iterations between which the server is away."""


class Clock(LoggingReporter):
    """Records the time from the end of each iteration to the end of the next."""

    def __init__(self, at: dict[int, Callable[[], None]]) -> None:
        self.at = at
        self.steps_ms: list[float] = []
        self.last = time.perf_counter()

    def phase(self, name: str, total: int, done: int = 0) -> Any:
        clock = self
        if name != "training":
            return super().phase(name, total, done)

        class Steps:
            def __enter__(self) -> "Steps":
                clock.last = time.perf_counter()
                return self

            def __exit__(self, *_exception: object) -> None:
                pass

            def advance(self) -> None:
                now = time.perf_counter()
                clock.steps_ms.append(1e3 * (now - clock.last))
                clock.last = now
                if len(clock.steps_ms) in clock.at:
                    clock.at[len(clock.steps_ms)]()
                    clock.last = time.perf_counter()  # the time of the action is not the loop's

        return Steps()

    def warn(self, text: str) -> None:
        print(text, file=sys.stderr)


def images(folder: Path) -> Path:
    """Write two classes of noise."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for number in range(20):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def measure(server: Server, data: Path, folder: Path, at: dict[int, Callable[[], None]]) -> list[float]:
    """Return the step times of one run, in milliseconds."""
    clock = Clock(at)
    options = {"train_dir": data / "train", "val_dir": data / "val", "input_size": 32, "batch_size": 8}
    options |= {"total_iters": ITERATIONS, "display_interval": 2, "workers": 0, "lr": 0.01}
    options |= {"val_interval": ITERATIONS, "save_interval": 20}
    request = TrainRequest(options=options, save_dir=folder, tracking_uri=server.uri)
    run_training(request, reporter=clock, stop=StopFlag())
    return clock.steps_ms


def figures(steps: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum of step times."""
    ordered = sorted(steps)
    return {
        "median_ms": round(statistics.median(steps), 2),
        "p99_ms": round(ordered[int(0.99 * len(ordered))], 2),
        "slowest_ms": round(ordered[-1], 2),
    }


def main() -> None:
    argparse.ArgumentParser(description=str(__doc__).partition("\n")[0]).parse_args()  # for --help
    torch.set_num_threads(1)
    first, last = OUTAGE
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server, data = Server(folder), images(folder / "images")
        ways: dict[str, dict[int, Callable[[], None]]] = {
            "warming up": {},
            "undisturbed": {},
            "killed": {first: lambda: server.send(signal.SIGKILL), last: server.start},
            "stopped": {first: lambda: server.send(signal.SIGSTOP), last: lambda: server.send(signal.SIGCONT)},
        }
        measured = {}
        try:
            for name, at in ways.items():
                print(name, file=sys.stderr)
                steps = measure(server, data, folder / name, at)
                # The first steps load libraries.
                measured[name] = [step for number, step in enumerate(steps) if number > 20]
        finally:
            server.send(signal.SIGCONT)
            server.kill()
    del measured["warming up"]
    document: dict[str, Any] = {name: figures(steps) for name, steps in measured.items()}
    for name in ("killed", "stopped"):
        document[name]["slowest_above_undisturbed_ms"] = round(max(measured[name]) - max(measured["undisturbed"]), 2)
    print(json.dumps({"iterations": ITERATIONS, "steps": document}, indent=2))


if __name__ == "__main__":
    main()
