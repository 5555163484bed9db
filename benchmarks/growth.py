"""Measure how times grow with the number of classes and of processes; `scale.py` and `listing.py` measure the rest.

    python benchmarks/growth.py [--classes 10 1000 20000] [--processes 1 2 4]

Prints JSON. For classes: milliseconds of a training step of V2 x0.5 (64 images of 64 px), and seconds of the report on
an evaluation of 10,000 images (outcomes, confusions, per-class table, figures). For processes, on this machine's CPU:
images per second of all of them together, and seconds of the whole `torchrun` command.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, report
from mlflow import MlflowClient
from photographs import write_photographs
from torch import nn

from shufflenet_mlflow import create_model
from shufflenet_mlflow.evaluation.plots import figures_of, write_figure
from shufflenet_mlflow.evaluation.report import Outcomes, Report
from shufflenet_mlflow.runtime.devices import keep_freed_memory, move_images, move_model
from shufflenet_mlflow.training.optimizer import make_optimizer

CPU = torch.device("cpu")
EVALUATED = 10_000
ITERATIONS = 60


def step_milliseconds(classes: int) -> float:
    """Return the median milliseconds of a training step."""
    model = move_model(create_model("shufflenet_v2_x0_5", classes), CPU)
    optimizer = make_optimizer(model, lr=0.01, momentum=0.9, weight_decay=4e-5, fused=True)
    images = move_images(torch.randn(64, 3, 64, 64), CPU)
    labels = torch.randint(classes, (64,))
    times = []
    for _ in range(12):
        began = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times[2:]), 1)


def report_seconds(classes: int, folder: Path) -> float:
    """Return the seconds of everything in an evaluation except the forward passes."""
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, classes, (2, EVALUATED))
    paths = tuple(f"{label}/{number}.jpg" for number, label in enumerate(labels))
    began = time.perf_counter()
    outcomes = Outcomes(paths, labels, predicted, generator.random(EVALUATED), generator.random(EVALUATED))
    results = Report(outcomes, tuple(f"class {number}" for number in range(classes)))
    outcomes.to_csv(results.classes)
    results.classes_csv()
    results.confusion_csv()
    for name, draw in figures_of(results, folder).items():
        write_figure(draw(), folder / name)
    return round(time.perf_counter() - began, 2)


def together(processes: int, root: Path) -> dict[str, float]:
    """Run a job with this many processes; return its speed and duration."""
    folder = root / f"{processes}"
    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    options = {"train-dir": root / "images", "val-dir": root / "images", "input-size": 64, "batch-size": 64, "lr": 0.01}
    options |= {"total-iters": ITERATIONS, "val-interval": ITERATIONS, "workers": 0, "tracking-uri": uri}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", "shufflenet_mlflow", "train", *words, "--no-log-models", "--json"]
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True, env=environment)
    seconds = time.perf_counter() - began
    run_id = json.loads(ran.stdout)["run_id"]
    points = MlflowClient(uri).get_metric_history(run_id, "train/images_per_second")
    return {
        "images_per_second": round(statistics.median(point.value for point in points[1:]), 1),
        "whole_command_seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure all numbers of classes and processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000, 20_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    keep_freed_memory(CPU)
    by_classes: dict[int, dict[str, float]] = {}
    by_processes: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for classes in arguments.classes:
            folder = root / f"classes{classes}"
            folder.mkdir()
            by_classes[classes] = {
                "step_milliseconds": step_milliseconds(classes),
                "report_seconds": report_seconds(classes, folder),
            }
        write_photographs(root / "images", 4, 80)
        for processes in arguments.processes:
            by_processes[processes] = together(processes, root)
    report({**describe(), "classes": by_classes, "processes": by_processes})


if __name__ == "__main__":
    main()
