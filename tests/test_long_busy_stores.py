"""An embedded store that other processes use at the same time: locked, new, or both."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.command_line import small_options
from tests.support.metrics import steps
from tests.support.processes import finish, start

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

LOCKED_SECONDS = 15.0


def test_a_store_that_is_locked_at_the_start(images: Path, workplace: Path, client: MlflowClient) -> None:
    """The run starts without it, and everything arrives once."""
    words = ["train", *small_options(images), "--total-iters", 60, "--save-dir", "m", "--json"]
    with closing(sqlite3.connect(workplace / "mlflow.db", isolation_level=None, check_same_thread=False)) as store:
        store.execute("BEGIN EXCLUSIVE")
        release = threading.Timer(LOCKED_SECONDS, store.rollback)
        process = start(workplace, *words)
        release.start()
        ended = finish(process)
        release.join()
    if ended["pending"]:
        assert finish(start(workplace, "sync", "m", "--json"))["pending"] == 0
    [run] = client.search_runs([entry.experiment_id for entry in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert steps(client, run.info.run_id, "train/loss") == list(range(2, 61, 2))
    assert len(run.inputs.dataset_inputs) == 2


def test_four_processes_open_a_new_store_at_once(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    words = ["train", *small_options(images), "--json"]
    processes = [start(tmp_path / f"work{number}", *words, env=env) for number in range(4)]
    ended = [finish(process) for process in processes]
    for number, document in enumerate(ended):
        if document["pending"]:
            folder = tmp_path / f"work{number}"
            assert finish(start(folder, "sync", document["save_dir"], "--json", env=env))["pending"] == 0
    assert [path.name for path in store.iterdir() if path.is_file()] == ["mlflow.db"]
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([entry.experiment_id for entry in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    for run in runs:
        assert steps(client, run.info.run_id, "train/loss") == list(range(2, 13, 2))
        assert len(run.inputs.dataset_inputs) == 2
