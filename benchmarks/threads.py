"""Measure how fast training is with several numbers of threads and workers, alone and beside other work.

V2 x0.5 at 64 pixels on small images, and V2 x1.0 at 224 on photographs, with two processes that decode; then the same
beside one busy process for each core. `default` is what training chooses, `spinning` the default of PyTorch: a thread
for each core, which spins while it waits. Each measurement is a process of its own. Prints JSON:

    PYTHONPATH=. python benchmarks/threads.py [--seconds 8]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe, report
from photographs import photograph, write_photographs

CASES = {
    "64 px": {"model": "shufflenet_v2_x0_5", "input_size": 64, "batch_size": 64},
    "224 px": {"model": "shufflenet_v2_x1_0", "input_size": 224, "batch_size": 16},
}
WARM_UP = 6


def measure(options: dict[str, Any], seconds: float) -> float:
    """Return images per second of a training with these options."""
    from shufflenet_mlflow.runtime.context import JobContext
    from shufflenet_mlflow.runtime.progress import LoggingReporter
    from shufflenet_mlflow.runtime.signals import StopFlag
    from shufflenet_mlflow.runtime.threads import threads_used
    from shufflenet_mlflow.workflows.bench import bare_training

    _, loop = bare_training(options, None, JobContext.alone(LoggingReporter(), StopFlag()))
    loop.state.model.train()
    batches = loop.batches(0, 10**6)
    with threads_used(loop.config.threads):
        for _ in range(WARM_UP):
            loop.step(loop.state.model, loop.fetch(batches))
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            loop.step(loop.state.model, loop.fetch(batches))
            steps += 1
        return steps * loop.config.batch_size / (time.perf_counter() - began)


def in_a_process(options: dict[str, Any], seconds: float, *, spinning: bool) -> float:
    """Measure in a process whose threads spin, or do not."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if spinning:
        del environment["OMP_WAIT_POLICY"]
    command = [sys.executable, __file__, "--measure", json.dumps(options), "--seconds", str(seconds)]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def settings(cores: int) -> dict[str, tuple[dict[str, Any], bool]]:
    """Return options, and whether threads spin, by name."""
    fixed = {f"{threads} threads": ({"threads": threads}, False) for threads in sorted({1, max(1, cores // 2), cores})}
    return {"default": ({}, False), **fixed, "spinning": ({"threads": cores}, True)}


def main() -> None:
    """Measure all cases, alone and beside busy processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(measure(json.loads(given.measure), given.seconds))
        return
    cores = len(os.sched_getaffinity(0))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        photographs, small = Path(folder, "photographs"), Path(folder, "small")
        write_photographs(photographs, 4, 150)
        write_photographs(small, 4, 150, make=partial(photograph, width=80, height=80))
        for case, options in CASES.items():
            images = str(small if options["input_size"] == 64 else photographs)
            for load, busy in (("alone", 0), ("beside busy processes", cores)):
                hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                try:
                    speeds = {
                        name: in_a_process(
                            {**options, "train_dir": images, "val_dir": images, "workers": 2, **more},
                            given.seconds,
                            spinning=spinning,
                        )
                        for name, (more, spinning) in settings(cores).items()
                    }
                finally:
                    for hog in hogs:
                        hog.kill()
                best = max(speed for name, speed in speeds.items() if name != "default")
                results[f"{case}, {load}"] = {
                    **{name: round(speed) for name, speed in speeds.items()},
                    "default_to_best": round(speeds["default"] / best, 2),
                }
    report({**describe(), "images_per_second": results})


if __name__ == "__main__":
    main()
