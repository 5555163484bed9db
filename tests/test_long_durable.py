"""`durable+http://…` in front of a real server that is killed or hangs, and in processes that are killed."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from shufflenet_mlflow.tracking import durable_runs
from shufflenet_mlflow.tracking.durable_store import DurableStore
from shufflenet_mlflow.tracking.refused import read_refused
from tests.support.command_line import Invoke
from tests.support.durable import start, sync
from tests.support.effort import repetitions
from tests.support.forked import Child, Report, fork
from tests.support.mlflow_server import Server

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def start_logging(uri: str, run_id: str, name: str) -> Child:
    """Fork a process that logs to a run until it is killed, and reports each step whose calls have returned."""

    def work(report: Report) -> None:
        store, step = DurableStore(uri), 0
        while True:
            store.log_metric(run_id, Metric(name, step * 0.5, 1000, step))
            store.log_metric(run_id, Metric("same", step + (name == "b") / 2, 1000, 0))
            store.log_param(run_id, Param(f"{name}{step % 50}", str(step % 50)))
            report(str(step))
            step += 1
            time.sleep(0.002)

    return fork(work)


def faults(client: MlflowClient, run_id: str, logged: dict[str, int]) -> list[str]:
    """Return what of the steps, metric -> number, is missing in the run or there more than once.

    The step in which a process was killed may be there or not.
    """
    found, params, together = [], client.get_run(run_id).data.params, 0
    for name, number in logged.items():
        points = client.get_metric_history(run_id, name)
        steps = sorted(point.step for point in points)
        if steps not in (list(range(number)), list(range(number + 1))) or any(p.value != p.step * 0.5 for p in points):
            missing, twice = set(range(number)) - set(steps), len(steps) - len(set(steps))
            found.append(f"{name}: {len(missing)} of {number} missing ({sorted(missing)[:5]}), {twice} twice")
        if not {f"{name}{step}": str(step) for step in range(min(50, number))}.items() <= params.items():
            found.append(f"parameters of {name}")
        together += number
    same = client.get_metric_history(run_id, "same")
    if not together <= len(same) <= together + len(logged):
        found.append(f"same: {len(same)} of {together}")
    return found


def test_killed_processes_and_killed_servers(server: Server, shufflenet: Invoke) -> None:
    """Twenty times, a process or two of one run are killed at random moments, while the server goes and comes."""
    generator = random.Random(0)
    for number in range(repetitions(full=20, ci=3)):
        run_id = MlflowClient(server.uri).create_run("0").info.run_id
        children = {name: start_logging(server.uri, run_id, name) for name in ("a", "b")[: 1 + number % 2]}
        time.sleep(generator.uniform(0, 2))
        how = generator.choice((signal.SIGKILL, signal.SIGSTOP, None))
        if how is not None:
            server.send(how)
        for child in children.values():
            child.kill_after(generator.uniform(0, 1))
        logged = {name: len(child.wait()[1]) for name, child in children.items()}
        if how is signal.SIGKILL:
            server.process.wait()
            server.start()
        elif how is signal.SIGSTOP:
            server.send(signal.SIGCONT)
        result = shufflenet("sync", "mlflow-journal")
        assert not any(logged.values()) or result.exit_code == 0, result.output
        found = faults(MlflowClient(server.uri), run_id, logged)
        assert not found, (number, how, logged, found)


SCRIPT = """
import os, signal, sys
import mlflow
import numpy

pid = int(sys.argv[1])
run = mlflow.start_run()
print(run.info.run_id, flush=True)
mlflow.log_params({"lr": 0.1, "epochs": 3})
for step in range(300):
    if step == 100:
        os.killpg(pid, signal.SIGKILL)
    mlflow.log_metrics({"loss": 1 / (step + 1), "f1": step / 300}, step=step)
mlflow.log_text("notes", "deep/notes.txt")
mlflow.log_text("first", "again.txt")
mlflow.log_text("second", "again.txt")
mlflow.set_tag("who", "me")
mlflow.log_input(mlflow.data.from_numpy(numpy.zeros((2, 2)), name="zeros"), context="training")
print(len(mlflow.get_run(run.info.run_id).data.params), flush=True)
if sys.argv[2] == "ends":
    mlflow.end_run("FAILED")
"""
"""Its server is killed on the way. It ends its run, or leaves that to MLflow at the end of the process."""


@pytest.mark.parametrize("how", ["ends", "does not end"])
def test_a_script_whose_server_is_killed(how: str, server: Server, tmp_path: Path) -> None:
    process = start(tmp_path, server.uri, SCRIPT, str(server.process.pid), how)
    out, err = process.communicate()
    server.process.wait()
    server.start()
    assert process.returncode == 0, err
    run_id = out.split()[0]
    folder = tmp_path / "mlflow-journal" / run_id
    assert f"`shufflenet sync {folder}`, or the next run in that folder, delivers them" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert f"sent {err.splitlines()[-1].partition(' ')[0]} entries to 1 run" in sync(tmp_path)
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == ("FAILED" if how == "ends" else "FINISHED") and run.info.end_time
    assert run.data.params == {"lr": "0.1", "epochs": "3"} and run.data.tags["who"] == "me"
    for name in ("loss", "f1"):
        assert [point.step for point in client.get_metric_history(run_id, name)] == list(range(300))
    assert [file.path for file in client.list_artifacts(run_id)] == ["again.txt", "deep"]
    assert Path(client.download_artifacts(run_id, "again.txt", str(tmp_path))).read_text() == "second"
    assert len(run.inputs.dataset_inputs) == 1
    assert "nothing is pending" in sync(tmp_path)


ALIVE = """
import mlflow

with mlflow.start_run() as run:
    for step in range(50):
        mlflow.log_metric("loss", step, step=step)
    mlflow.log_text("notes", "deep/notes.txt")
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")) == 50
    assert [file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)] == ["deep"]
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/deep/notes.txt") == "notes"
    mlflow.client.MlflowClient().create_registered_model("durable")
found = mlflow.search_runs(filter_string="metrics.loss = 49", output_format="list")
assert [run.info.run_id] == [one.info.run_id for one in found]
assert found[0].info.status == "FINISHED"
"""


def test_a_script_whose_server_lives(server: Server, tmp_path: Path) -> None:
    """Whatever was written can be read, as without a journal, and nothing stays on the disk."""
    process = start(tmp_path, server.uri, ALIVE)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert not (tmp_path / "mlflow-journal").exists()


def test_a_command_behind_the_journal(
    server: Server, shufflenet: Invoke, small_train: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shufflenet train` has a journal of its own, and writes to the server behind the address."""
    summary = small_train("--tracking-uri", f"durable+{server.uri}", "--total-iters", 2)
    assert MlflowClient(server.uri).get_run(summary["run_id"]).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"durable+{server.uri}")
    for words in (("runs", "show", summary["run_id"]), ("checkpoints", "ls", f"runs:/{summary['run_id']}")):
        result = shufflenet(*words)
        assert result.exit_code == 0, result.output


def test_a_file_that_never_arrives(server: Server, shufflenet: Invoke, tmp_path: Path) -> None:
    """MLflow takes it under a name that it then cuts short; it is set aside, and what comes after it arrives."""
    client = MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    path = tmp_path / "a#b.txt"
    path.write_text("kept")
    durable_runs.record_file(server.uri, run_id, path, "")  # as before such names were refused
    DurableStore(server.uri).log_metric(run_id, Metric("after", 1.0, 1000, 1))
    folder = durable_runs.folder_of(run_id)
    durable_runs.finish_all()
    result = shufflenet("sync", "mlflow-journal")
    assert [entry["kind"] for entry in read_refused(folder)] == ["file"]
    assert "although MLflow took it" in read_refused(folder)[0]["reason"]
    assert "1 entry was refused by MLflow and kept in" in result.output
    assert [point.value for point in client.get_metric_history(run_id, "after")] == [1.0]
