"""Measure what `mlflow.log_metric` costs a script through `durable+http://`, and through MLflow's own `http://`.

Both log to one real `mlflow server`, each in a process of its own: first while it is alive, then after it was killed
(SIGKILL). A dead server keeps MLflow's own client for minutes; it is given up after `--give-up` seconds. Prints JSON:
seconds per call, the longest call, and for the journal also the bytes that it took and how many points `shufflenet
sync` brought to the run once the server was back; exits with status 1 if any is missing:

    PYTHONPATH=. python benchmarks/durable.py [--points N] [--give-up SECONDS]
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
from typing import IO, Any, cast

from machine import describe, report
from mlflow import MlflowClient

from tests.support.durable import environment, sync
from tests.support.mlflow_server import Server

SCRIPT = """
import json, sys, time
import mlflow

points, run_id = int(sys.argv[1]), sys.argv[2]
client = mlflow.MlflowClient()
client.get_run(run_id)
print("ready", flush=True)
sys.stdin.readline()
for step in range(points):
    began = time.perf_counter()
    try:
        client.log_metric(run_id, "loss", step / 3, step=step)
    except mlflow.MlflowException:
        pass
    print(json.dumps(time.perf_counter() - began), flush=True)
"""


def logged(folder: Path, server: Server, run_id: str, points: int, *, scheme: str, alive: bool, limit: float) -> Any:
    """Log points with the server alive, or killed just before; return what the calls took, in seconds.

    Args:
        limit: seconds after which the script is killed.
    """
    env = {**environment(folder, server.uri), "MLFLOW_TRACKING_URI": scheme + server.uri.partition("://")[2]}
    command = [sys.executable, "-c", SCRIPT, str(points), run_id]
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stdin, stdout = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
    stdout.readline()
    if not alive:
        server.kill()
    stdin.write("\n")
    stdin.flush()
    began = time.perf_counter()
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    took = time.perf_counter() - began
    calls = sorted(json.loads(line) for line in out.splitlines())
    found: dict[str, Any] = {"calls": len(calls)}
    if calls:
        found["median_ms"] = round(1000 * statistics.median(calls), 3)
        found["p99_ms"] = round(1000 * calls[int(0.99 * len(calls))], 3)
        found["longest_ms"] = round(1000 * calls[-1], 3)
    given_up = len(calls) < points  # one call was still waiting
    found["given_up_after_s" if given_up else "with_the_end_of_the_process_s"] = round(took, 1)
    return found


def main() -> None:
    """Measure both sides, in turn, alive and dead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--give-up", type=float, default=60.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder)
        try:
            sides: dict[str, Any] = {}
            for alive in (True, False):
                for scheme in ("http://", "durable+http://"):
                    run_id = MlflowClient(server.uri).create_run("0").info.run_id
                    found = logged(
                        folder, server, run_id, given.points, scheme=scheme, alive=alive, limit=given.give_up
                    )
                    sides.setdefault(scheme, {})["alive" if alive else "dead"] = found
                    if not alive:
                        server.start()
            journal = folder / "mlflow-journal" / run_id / "spool.jsonl"
            sides["durable+http://"]["journal_bytes_per_point"] = round(os.path.getsize(journal) / given.points)
            sync(folder)
            arrived = len(MlflowClient(server.uri).get_metric_history(run_id, "loss"))
            sides["durable+http://"]["arrived_after_sync"] = arrived
        finally:
            server.kill()
    report({**describe(), "points": given.points, "sides": sides})
    sys.exit(arrived != given.points)


if __name__ == "__main__":
    main()
