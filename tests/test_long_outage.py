"""Guarantee 2: whatever the tracking server does during a run, everything arrives in the end, once.

The real command runs against a real server that is killed, stopped, restarted, slowed down, or answers 5xx and
429, at random moments. How little the loop notices is measured by `benchmarks/outage.py`.
"""

import hashlib
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints, list_manifests
from tests.support.command_line import small_options
from tests.support.effort import repetitions
from tests.support.metrics import steps
from tests.support.mlflow_server import Server
from tests.support.processes import Process, start
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ITERATIONS = 300
SAVE_EVERY = 25


def shufflenet(folder: Path, uri: str, *words: object) -> Process:
    env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}  # else one that hangs holds a request long
    return start(folder, *words, env=env)


def finish(process: Process) -> Any:
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return json.loads(out)


def disturb(server: Server, proxy: Proxy, kind: str, seconds: float) -> None:
    """Cause one outage, after which the server answers again."""
    if kind == "killed":
        server.kill()
        time.sleep(seconds)
        server.start()
    elif kind == "stopped":
        server.send(signal.SIGSTOP)
        time.sleep(seconds)
        server.send(signal.SIGCONT)
    else:
        proxy.mode = kind
        time.sleep(seconds)
        proxy.mode = "pass"


OUTAGES = [
    *(["killed", "stopped"], ["503", "slow"], ["500", "429"]),
    *(["killed"], ["stopped"], ["slow", "stopped"], ["killed"], ["stopped", "stopped"], ["429", "killed"]),
    ["stopped", "503"],
]
"""The first three have every kind of outage; the full run tries all."""


@pytest.mark.parametrize("seed", range(repetitions(full=len(OUTAGES), ci=1)), ids=lambda seed: "+".join(OUTAGES[seed]))
def test_everything_is_there_afterwards_once(
    seed: int, server: Server, proxy: Proxy, images: Path, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    options = ["--total-iters", ITERATIONS, "--save-interval", SAVE_EVERY, "--val-interval", 100, "--save-dir", "m"]
    process = shufflenet(tmp_path / "work", proxy.uri, "train", *small_options(images), *options, "--json")
    assert process.stderr is not None
    for line in process.stderr:  # begin the first outage while it trains
        if line.startswith("iteration") and int(line.split()[1].partition("/")[0]) >= generator.randint(4, 60):
            break
    for kind in OUTAGES[seed]:
        disturb(server, proxy, kind, generator.uniform(0.5, 4.0))
        time.sleep(generator.uniform(0.0, 1.0))
    ended = finish(process)
    assert ended["iters"] == ITERATIONS
    if ended["pending"]:
        synced = finish(shufflenet(tmp_path / "work", proxy.uri, "sync", "m", "--json"))
        assert synced["pending"] == 0
        ended["run_id"] = ended["run_id"] or synced["run_id"]
    check(server, ended["run_id"], tmp_path / "work" / "m")


def check(server: Server, run_id: str, directory: Path) -> None:
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert steps(client, run_id, "train/loss") == list(range(2, ITERATIONS + 1, 2))
    assert steps(client, run_id, "val/top1") == [100, 200, 300]
    every = list(range(SAVE_EVERY, ITERATIONS + 1, SAVE_EVERY))
    saved = {manifest.iters for manifest in list_manifests(directory)}
    assert saved >= set(every)
    assert steps(client, run_id, "loss") == sorted(saved)
    uploads = Path(server.folder) / "artifacts" / run.info.experiment_id / run_id / "artifacts" / "checkpoints"
    for path, manifest in zip(list_checkpoints(directory), list_manifests(directory), strict=True):
        assert hashlib.sha256((uploads / path.name).read_bytes()).hexdigest() == manifest.sha256
    assert json.loads(run.data.tags["checkpoint.latest"])["path"].endswith("bnps-checkpoint-000300.pth.tar")
    assert len(run.inputs.dataset_inputs) == 2


def test_a_server_that_is_away_all_the_time(server: Server, images: Path, tmp_path: Path) -> None:
    """It is unreachable from start to end; `sync` delivers everything from another process."""
    proxy = Proxy(server)
    proxy.mode = "503"
    options = ["--total-iters", ITERATIONS, "--save-interval", SAVE_EVERY, "--val-interval", 100, "--save-dir", "m"]
    ended = finish(shufflenet(tmp_path / "work", proxy.uri, "train", *small_options(images), *options, "--json"))
    assert (ended["run_id"], ended["iters"]) == (None, ITERATIONS)
    assert proxy.refused > 1
    proxy.mode = "pass"
    killed = shufflenet(tmp_path / "work", proxy.uri, "sync", "m", "--json")
    time.sleep(6.0)
    killed.kill()
    killed.communicate()
    synced = finish(shufflenet(tmp_path / "work", proxy.uri, "sync", "m", "--json"))
    proxy.close()
    check(server, synced["run_id"], tmp_path / "work" / "m")
    client = MlflowClient(server.uri)
    names = [run.info.run_name for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]
    assert len([name for name in names if name]) == len(names)
