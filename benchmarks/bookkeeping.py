"""Measure what tracking adds to a run: checkpoints, metrics and models in MLflow, against a loop that keeps nothing.

    PYTHONPATH=. python benchmarks/bookkeeping.py [--device auto] [--model NAME] [--iterations 400] [--rounds 3]

The same training with the default intervals: by `shufflenet train`'s own job into the embedded store and into
`mlflow server`, and by the same loop with nothing kept. Each runs in a process of its own, in turn. Prints JSON with
medians of the seconds in the loop (validations and checkpoints included), before it and after it, and of the processor
time of the process and its workers. `loop_percent` is what tracking adds to the loop. What it adds outside does not
grow with the run: `whole_within_2_percent_from_minutes` is the length of a run above which the total is below 2 %.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import add_device, apart, choose_device, describe, report
from photographs import write_photographs

SIDES = ("off", "embedded", "server")
SIZE, BATCH, CLASSES, PER_CLASS = 128, 32, 4, 80


def measure(side: str, uri: str, root: Path, options: dict[str, Any]) -> dict[str, float]:
    """Return the times of one training in this process."""
    from shufflenet_mlflow.runtime.context import JobContext
    from shufflenet_mlflow.runtime.progress import LoggingReporter
    from shufflenet_mlflow.runtime.signals import StopFlag
    from shufflenet_mlflow.workflows.bench import bare_training
    from shufflenet_mlflow.workflows.train import run_training
    from shufflenet_mlflow.workflows.training.request import TrainRequest

    loop = {"seconds": 0.0, "from": 0.0, "to": 0.0}

    class Clock(LoggingReporter):
        @contextmanager
        def phase(self, name: str, total: int, done: int = 0) -> Any:
            began = time.perf_counter()
            with super().phase(name, total, done) as phase:
                yield phase
            if name == "training":
                loop.update({"seconds": time.perf_counter() - began, "from": began, "to": time.perf_counter()})

    began = time.perf_counter()
    given = {"train_dir": str(root / "images"), "val_dir": str(root / "images"), "lr": 0.01, **options}
    request = TrainRequest(options=given, tracking_uri=uri, save_dir=Path(tempfile.mkdtemp(dir=root)))
    if side == "off":
        _, trainer = bare_training(given, None, JobContext.alone(Clock(), StopFlag()))
        trainer.run()
    else:
        run_training(request, reporter=Clock(), stop=StopFlag())
    ended = time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "loop": loop["seconds"],
        "before": loop["from"] - began,
        "behind": ended - loop["to"],
        "processor": sum(one.ru_utime + one.ru_stime for one in used),
    }


def main() -> None:
    """Measure all sides in turn."""
    parser = argparse.ArgumentParser()
    add_device(parser)
    parser.add_argument("--model", default="shufflenet_v2_x0_5")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, uri, folder, options = arguments.measure
        print(json.dumps(measure(side, uri, Path(folder), json.loads(options))))
        return
    from tests.support.mlflow_server import Server

    device = choose_device(arguments.device)
    options = {
        "model": arguments.model,
        "total_iters": arguments.iterations,
        "input_size": SIZE,
        "batch_size": BATCH,
        "device": device.type,
    }
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_photographs(root / "images", CLASSES, PER_CLASS)
        (root / "server").mkdir()
        server = Server(root / "server")
        try:
            uris = {"off": "", "embedded": f"sqlite:///{root}/mlflow.db", "server": server.uri}
            for _ in range(arguments.rounds):
                for side in SIDES:
                    words = [side, uris[side], scratch, json.dumps(options)]
                    found[side].append(apart(__file__, *words, cwd=scratch))
        finally:
            server.kill()
    medians = {
        side: {name: statistics.median(one[name] for one in runs) for name in runs[0]} for side, runs in found.items()
    }
    off = medians["off"]
    table: dict[str, Any] = {}
    for side, values in medians.items():
        table[side] = {name: round(value, 2) for name, value in values.items()}
        if side != "off":
            share = values["loop"] / off["loop"] - 1
            outside = values["before"] + values["behind"] - off["before"] - off["behind"]
            table[side]["loop_percent"] = round(100 * share, 2)
            table[side]["outside_seconds"] = round(outside, 2)
            left = 0.02 - max(0.0, share)
            table[side]["whole_within_2_percent_from_minutes"] = round(outside / left / 60, 1) if left > 0 else None
    report(
        {
            **describe(device),
            **options,
            "loops": {side: [round(one["loop"], 2) for one in runs] for side, runs in found.items()},
            "sides": table,
        }
    )


if __name__ == "__main__":
    main()
