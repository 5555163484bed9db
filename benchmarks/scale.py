"""Time resolving, listing and comparing runs, against their number of checkpoints and metric points.

    PYTHONPATH=. python benchmarks/scale.py [--server] [--checkpoints 20 200 2000] [--points 1000 10000 100000]

Each size gets a run of its own, with saved checkpoints of 20 kB and points of four metrics. Prints JSON with medians of
three measurements, in seconds: `resolve` is `get_latest_model` of the run ID with an empty cache, `list` is
`checkpoints ls`, `compare` is `compare` with curves of the run and one other, `runs` is the table. `--server` measures
through `mlflow server` with SQLite, otherwise the embedded store is used.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from shufflenet_mlflow import get_latest_model, save_checkpoint
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.workflows.checkpoints import list_rows
from shufflenet_mlflow.workflows.compare import run_comparison
from shufflenet_mlflow.workflows.runs import DEFAULT_COLUMNS, list_runs

METRICS = ("train/loss", "train/top1", "val/loss", "val/top1")
BATCH = 1000
REPEATS = 3


def seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of a few calls."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 3)


def make_run(client: MlflowClient, experiment: str, checkpoints: int, points: int, folder: Path) -> str:
    """Create a run of this size; return its ID."""
    run_id = client.create_run(experiment, run_name=f"{checkpoints} checkpoints, {points} points").info.run_id
    client.log_batch(run_id, params=[Param("batch_size", "64"), Param("lr", "0.1")])
    steps = range(1, points // len(METRICS) + 1)
    metrics = [Metric(name, 1 / step, step * 1000, step) for step in steps for name in METRICS]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH])
    state = {"state_dict": {"w": torch.zeros(5000)}}
    for number in range(1, checkpoints + 1):
        save_checkpoint(state, number, epoch=1, loss=1 / number, directory=folder / "saved" / run_id, run_id=run_id)
    client.set_terminated(run_id)
    return str(run_id)


def measure(uri: str, run_id: str, other: str, folder: Path) -> dict[str, float]:
    """Return the seconds of each use of the run."""
    reporter = LoggingReporter()

    def resolve() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            path, _ = get_latest_model(run_id, cache_dir=cache)
            assert path is not None

    return {
        "resolve": seconds(resolve),
        "list": seconds(lambda: list_rows(run_id, tracking_uri=uri, reporter=reporter)),
        "compare": seconds(lambda: run_comparison([run_id, other], out=folder / "page", tracking_uri=uri)),
        "runs": seconds(
            lambda: list_runs(
                experiment="scale",
                filter_string="",
                sort="started",
                ascending=False,
                columns=DEFAULT_COLUMNS,
                limit=50,
                tracking_uri=uri,
            )
        ),
    }


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[20, 200, 2000])
    parser.add_argument("--points", type=int, nargs="+", default=[1000, 10_000, 100_000])
    given = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as scratch:
        folder, server = Path(scratch), None
        os.chdir(folder)
        if given.server:
            from tests.support.mlflow_server import Server

            server = Server(folder)
        uri = server.uri if server is not None else f"sqlite:///{folder}/mlflow.db"
        os.environ["MLFLOW_TRACKING_URI"] = uri
        try:
            client = MlflowClient(uri)
            experiment = client.create_experiment("scale")
            other = make_run(client, experiment, 1, max(given.points), folder)
            rows = []
            for checkpoints, points in zip(given.checkpoints, given.points, strict=True):
                run_id = make_run(client, experiment, checkpoints, points, folder)
                times = measure(uri, run_id, other, folder)
                rows.append({"checkpoints": checkpoints, "points": points, **times})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        finally:
            if server is not None:
                server.kill()
    print(json.dumps({"store": "mlflow server" if given.server else "embedded", "seconds": rows}, indent=2))


if __name__ == "__main__":
    main()
