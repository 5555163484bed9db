"""Against a real `mlflow server`, in processes of their own, with real signals. Minutes: marked long."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_equal_payloads, small_options, steps
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoint import read_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

UP_WITHIN = 120.0


class Server:
    """`mlflow server` with SQLite and an artifact folder, on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + UP_WITHIN
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < deadline, "mlflow server did not come up"
                time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


def start(folder: Path, *arguments: object) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "shufflenet_mlflow", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "SHUFFLENET_CACHE_DIR": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", status: int = 0) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == status, err
    document: dict[str, Any] = json.loads(out)
    return document


def options(images: Path, iters: int) -> list[object]:
    return [*small_options(images), "--total-iters", iters, "--json"]


def wait_for_iteration(process: "subprocess.Popen[str]", iteration: int) -> None:
    """Until the plain progress lines on stderr have come so far."""
    assert process.stderr is not None
    for line in process.stderr:
        words = line.split()
        if words[:1] == ["iteration"] and int(words[1].partition("/")[0]) >= iteration:
            return
    pytest.fail("the process ended early")


def only_run(server: Server) -> str:
    client = MlflowClient(server.uri)
    [run] = client.search_runs([item.experiment_id for item in client.search_experiments()])
    return str(run.info.run_id)


def test_train_here_evaluate_there(server: Server, images: Path, tmp_path: Path) -> None:
    trained = finish(start(tmp_path / "here", "train", *options(images, 12)))
    evaluated = finish(start(tmp_path / "there", "eval", trained["run_id"], "--json"))
    assert (evaluated["top1"], evaluated["top5"]) == (trained["val_top1"], trained["val_top5"])
    assert Path(evaluated["checkpoint"]).is_relative_to(tmp_path / "there")
    assert MlflowClient(server.uri).get_run(trained["run_id"]).info.status == "FINISHED"


def test_sigterm_then_resume_by_run_id_elsewhere(server: Server, images: Path, tmp_path: Path) -> None:
    first = start(tmp_path / "first", "train", *options(images, 60))
    wait_for_iteration(first, 10)
    first.send_signal(signal.SIGTERM)
    stopped = finish(first, status=128 + signal.SIGTERM)
    client = MlflowClient(server.uri)
    assert client.get_run(stopped["run_id"]).info.status == "KILLED"
    assert 10 <= stopped["iters"] < 60
    ended = finish(start(tmp_path / "second", "train", "--resume", stopped["run_id"], "--json"))
    assert (ended["run_id"], ended["iters"]) == (stopped["run_id"], 60)
    assert steps(client, ended["run_id"], "train/loss") == list(range(2, 61, 2))
    assert client.get_run(ended["run_id"]).info.status == "FINISHED"


def test_ctrl_c_with_worker_processes(server: Server, images: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole group, the workers included."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shufflenet_mlflow", "train", *map(str, options(images, 4000)), "--workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_iteration(process, 4)
    os.killpg(process.pid, signal.SIGINT)
    stopped = finish(process, status=128 + signal.SIGINT)
    assert Path(tmp_path / stopped["checkpoint"]).exists()


@pytest.mark.parametrize("seed", range(4))
def test_sigkill_then_resume_by_run_id_elsewhere(server: Server, images: Path, tmp_path: Path, seed: int) -> None:
    """Killed at a random moment; continued in an empty folder from the run ID; equal to an undisturbed run."""
    whole = finish(start(tmp_path / "whole", "train", *options(images, 24)))
    reference = read_checkpoint(tmp_path / "whole" / whole["checkpoint"])
    killed = start(tmp_path / "killed", "train", *options(images, 24))
    wait_for_iteration(killed, 6)
    time.sleep(random.Random(seed).uniform(0, 0.8))
    killed.kill()
    killed.communicate()
    client = MlflowClient(server.uri)
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
    [run_id] = [run.info.run_id for run in runs if run.info.run_id != whole["run_id"]]
    ended = finish(start(tmp_path / "elsewhere", "train", "--resume", run_id, "--workers", seed % 3, "--json"))
    payload = read_checkpoint(tmp_path / "elsewhere" / ended["checkpoint"])
    for key in ("state_dict", "optimizer_state_dict", "best", "loss", "sampler_state", "rng_state"):
        assert_equal_payloads(payload[key], reference[key], key)
    for name in ("train/loss", "val/top1", "val/loss"):
        points = [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        assert sorted(points) == points
        expected = [(point.step, point.value) for point in client.get_metric_history(whole["run_id"], name)]
        assert points == expected
    for name in ("epoch", "loss"):
        assert len(steps(client, run_id, name)) == len(set(steps(client, run_id, name)))


def test_the_server_dies_and_comes_back(server: Server, images: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "work", "train", *options(images, 600), "--val-interval", 100, "--save-interval", 100)
    wait_for_iteration(process, 30)
    server.kill()
    time.sleep(3)
    server.start()
    ended = finish(process)
    assert ended["iters"] == 600
    client = MlflowClient(server.uri)
    assert client.get_run(ended["run_id"]).info.status == "FINISHED"
    assert steps(client, ended["run_id"], "train/loss") == list(range(2, 601, 2))
    assert steps(client, ended["run_id"], "val/top1") == list(range(100, 601, 100))
    assert finish(start(tmp_path / "there", "eval", ended["run_id"], "--json"))["top1"] == ended["val_top1"]


def test_the_server_dies_for_good(server: Server, images: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "work", "train", *options(images, 60))
    wait_for_iteration(process, 10)
    server.kill()
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert "training goes on" in err
    assert err.splitlines()[-1].startswith("Error: cannot ")
    assert "the checkpoints on the disk are complete" in err.splitlines()[-1]
    [folder] = (tmp_path / "work" / "models").iterdir()
    assert (folder / "bnps-checkpoint-000060.pth.tar").exists()
    server.start()
    resumed = finish(start(tmp_path / "work", "train", "--resume", folder, "--json"))
    assert (resumed["run_id"], resumed["iters"]) == (only_run(server), 60)
