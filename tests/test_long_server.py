"""Commands in their own processes against a real `mlflow server`, with real signals."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.command_line import small_options
from tests.support.effort import only_in_full_run
from tests.support.metrics import steps
from tests.support.mlflow_server import Server
from tests.support.processes import finish, start, wait_for_iteration

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


def options(images: Path, iters: int) -> list[object]:
    return [*small_options(images), "--total-iters", iters, "--json"]


def only_run(server: Server) -> str:
    client = MlflowClient(server.uri)
    [run] = client.search_runs([item.experiment_id for item in client.search_experiments()])
    return str(run.info.run_id)


def test_train_here_evaluate_there(server: Server, images: Path, tmp_path: Path) -> None:
    trained = finish(start(tmp_path / "here", "train", *options(images, 12)))
    evaluated = finish(start(tmp_path / "there", "eval", f"{trained['run_id']}@latest", "--json"))
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
    process = start(tmp_path, "train", *options(images, 4000), "--workers", "2")
    wait_for_iteration(process, 4)
    os.killpg(process.pid, signal.SIGINT)
    stopped = finish(process, status=128 + signal.SIGINT)
    assert Path(tmp_path / stopped["checkpoint"]).exists()


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
    assert finish(start(tmp_path / "there", "eval", f"{ended['run_id']}@latest", "--json"))["top1"] == ended["val_top1"]


@only_in_full_run
def test_the_server_dies_for_good(server: Server, images: Path, tmp_path: Path) -> None:
    """Training still succeeds and says what is left to do, and `sync` does it."""
    process = start(tmp_path / "work", "train", *options(images, 60))
    wait_for_iteration(process, 10)
    server.kill()
    out, err = process.communicate()
    assert process.returncode == 0, err
    ended = json.loads(out)
    assert "Traceback" not in err
    assert "training goes on" in err
    assert (
        f"`shufflenet sync {ended['save_dir']}`, or the next run in that folder, delivers them" in err.splitlines()[-1]
    )
    assert ended["pending"] > 0
    assert Path(tmp_path / "work" / ended["checkpoint"]).name == "bnps-checkpoint-000060.pth.tar"
    server.start()
    synced = finish(start(tmp_path / "work", "sync", ended["save_dir"], "--json"))
    assert (synced["run_id"], synced["pending"]) == (only_run(server), 0)
    client = MlflowClient(server.uri)
    assert client.get_run(synced["run_id"]).info.status == "FINISHED"
    assert steps(client, synced["run_id"], "train/loss") == list(range(2, 61, 2))


@only_in_full_run
def test_ctrl_c_while_waiting_for_a_slow_server(server: Server, images: Path, tmp_path: Path) -> None:
    """Training has ended; what has not been delivered stays in the journal."""
    process = start(tmp_path / "work", "train", *options(images, 12), "--save-dir", "m")
    wait_for_iteration(process, 4)
    server.send(signal.SIGSTOP)
    while not (tmp_path / "work" / "m" / "bnps-checkpoint-000012.pth.tar").exists():
        time.sleep(0.1)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, err
    assert json.loads(out)["pending"] > 0
    server.send(signal.SIGCONT)
    assert finish(start(tmp_path / "work", "sync", "m", "--json"))["pending"] == 0
    assert MlflowClient(server.uri).get_run(only_run(server)).info.status == "FINISHED"
