"""Processes under a real `torchrun`: killed ones, other numbers of them, machines that share nothing."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.runtime.signals import ECHO_SECONDS
from shufflenet_mlflow.tracking.journal_file import read_pending
from tests.support.command_line import small_options
from tests.support.effort import cases, only_in_full_run
from tests.support.metrics import steps, values
from tests.support.mlflow_server import Server
from tests.support.network import free_port
from tests.support.payloads import assert_equal_payloads
from tests.support.processes import DOUBLE_PRECISION, Process, finish, kill, start, torchrun, wait_for_iteration, worker
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(600)]

ITERATIONS = 40


def options(images: Path, *more: object) -> list[object]:
    intervals = ("--total-iters", ITERATIONS, "--display-interval", 1, "--save-interval", 5, "--val-interval", 8)
    return [*small_options(images), *intervals, *more]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> dict[str, list[float]]:
    """Return the curves of one process that computes two micro-batches per batch."""
    folder = tmp_path_factory.mktemp("alone")
    uri = f"sqlite:///{folder}/mlflow.db"
    words = options(images, "--micro-batch-size", 4, "--tracking-uri", uri, "--json")
    return curves(MlflowClient(uri), finish(start(folder, "train", *words))["run_id"])


def curves(client: MlflowClient, run_id: str) -> dict[str, list[float]]:
    assert steps(client, run_id, "train/loss") == list(range(1, ITERATIONS + 1))
    assert steps(client, run_id, "val/loss") == list(range(8, ITERATIONS + 1, 8))
    return {name: values(client, run_id, name) for name in ("train/loss", "train/top1", "train/lr", "val/loss")}


def only_run(client: MlflowClient) -> Any:
    [found] = client.search_runs([item.experiment_id for item in client.search_experiments()])
    return found


def assert_close(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    """Compare curves up to rounding, which forty steps with four images in each BN amplify."""
    for name, curve in expected.items():
        assert found[name] == pytest.approx(curve, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("victim", cases([0, 1], ci=1))
def test_a_lost_process_is_started_again_and_the_run_goes_on(
    victim: int, images: Path, client: MlflowClient, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    """With one command, no name and no folder, `torchrun` restarts the processes, and there is one run."""
    process = start(tmp_path / "work", "train", *options(images), "--json", under=torchrun(2, max_restarts=2))
    wait_for_iteration(process, 17)
    worker(process, victim).send_signal(signal.SIGKILL)
    ended = finish(process)
    assert ended["iters"] == ITERATIONS
    found = only_run(client)
    assert (found.info.run_id, found.info.status) == (ended["run_id"], "FINISHED")
    assert_close(curves(client, ended["run_id"]), alone)
    assert int(found.data.tags["resumed.from_iters"]) <= 17 + 5


def test_losses_do_not_depend_on_how_a_batch_is_divided(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    """Four micro-batches: in one process, two in each of two, or one in each of four.

    The gradients are then added in another order, and a network at its start multiplies that rounding by a thousand
    in each step. So this compares the first steps, in double precision.
    """
    words = [*options(images), "--total-iters", 6, "--val-interval", 3, "--batch-size", 16, "--micro-batch-size", 4]
    found = []
    for processes in (1, 2, 4):
        under = torchrun(processes) if processes > 1 else ()
        folder = tmp_path / f"{processes}"
        ended = finish(
            start(folder, "train", *words, "--ema-decay", 0.9, "--json", under=under, program=DOUBLE_PRECISION)
        )
        payload = read_checkpoint(folder / ended["checkpoint"])
        assert (payload["environment"]["processes"], payload["environment"]["parts"]) == (processes, 4)
        first = {"train/loss": 3, "train/top1": 3, "val/loss": 1, "val/top1": 1}
        found.append([values(client, ended["run_id"], name)[:count] for name, count in first.items()])
    for others in found[1:]:
        for curve, expected in zip(others, found[0], strict=True):
            assert curve == pytest.approx(expected, rel=1e-6)


def stop_and_wait(process: Process) -> None:
    """Send SIGTERM to the launcher, as a scheduler does, and wait."""
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode != 0


def test_a_run_resumes_with_another_number_of_processes(
    images: Path, client: MlflowClient, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    """Two processes, one, then two, each time in an empty folder."""
    first = start(tmp_path / "first", "train", *options(images), under=torchrun(2))
    wait_for_iteration(first, 9)
    stop_and_wait(first)
    found = only_run(client)
    assert found.info.status == "KILLED"
    run_id = found.info.run_id
    second = start(tmp_path / "second", "train", "--resume", run_id)
    wait_for_iteration(second, 23)
    second.send_signal(signal.SIGTERM)
    second.communicate()
    assert second.returncode == 128 + signal.SIGTERM
    ended = finish(start(tmp_path / "third", "train", "--resume", run_id, "--json", under=torchrun(2)))
    assert ended["run_id"] == run_id
    assert_close(curves(client, run_id), alone)
    payload = read_checkpoint(tmp_path / "third" / ended["checkpoint"])
    assert payload["config"]["micro_batch_size"] == 4


def test_two_machines_that_share_nothing(
    server: Server, images: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    """Two launchers with folders and caches of their own; only the first machine reaches MLflow.

    Both are killed, and the job is resumed by its name in two empty folders.
    """
    reaches = {"MLFLOW_TRACKING_URI": server.uri}
    does_not = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}

    def launch(name: str) -> list[Process]:
        at = f"127.0.0.1:{free_port()}"
        words = options(images, "--job", "two-machines", "--json")
        return [
            start(
                tmp_path / f"{name}-{node}",
                "train",
                *words,
                env=env,
                under=torchrun(
                    1,
                    rendezvous=(
                        *("--nnodes", "2", "--node-rank", str(node)),
                        *("--master-addr", "127.0.0.1", "--master-port", at.rpartition(":")[2]),
                    ),
                ),
            )
            for node, env in enumerate((reaches, does_not))
        ]

    machines = launch("before")
    wait_for_iteration(machines[0], 13)
    for machine in machines:
        kill(machine)
    machines = launch("after")
    ended = finish(machines[0])
    _, err = machines[1].communicate()
    assert machines[1].returncode == 0, err
    client = MlflowClient(server.uri)
    assert only_run(client).info.run_id == ended["run_id"]
    assert_close(curves(client, ended["run_id"]), alone)
    assert not list((tmp_path / "after-1").rglob("*.pth.tar")), "the second machine writes nothing"


@only_in_full_run
def test_three_processes_go_on_bit_for_bit(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    """With three or more, the order in which gradients are added matters, and must be the same after resuming."""
    words = [*options(images), "--total-iters", 12, "--save-interval", 6, "--batch-size", 9, "--json"]
    whole = finish(start(tmp_path / "whole", "train", *words, "--save-dir", "m", under=torchrun(3)))
    middle = tmp_path / "whole" / "m" / "checkpoint-000006.pth.tar"
    parts = finish(start(tmp_path / "parts", "train", "--resume", middle, "--new-run", "--json", under=torchrun(3)))
    expected, found = (
        read_checkpoint(tmp_path / name / ended["checkpoint"]) for name, ended in (("whole", whole), ("parts", parts))
    )
    for key in ("state_dict", "optimizer_state_dict", "loss", "metrics"):
        assert_equal_payloads(found[key], expected[key], key)


def test_processes_with_other_options_end_with_one_line(images: Path, tmp_path: Path) -> None:
    """With different intervals they would wait for each other for ever."""
    port = str(free_port())

    def begin(rank: int, *more: object) -> Process:
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return start(tmp_path / f"{rank}", "train", *options(images, *more), env=env)

    leader, other = begin(0), begin(1, "--val-interval", 10)
    _, err = leader.communicate()
    other.communicate()
    assert (leader.returncode, other.returncode) == (2, 2)
    assert "its --val-interval (=10) differs from that of process 0 (=8); give every process the same" in err
    assert len([line for line in err.splitlines() if line.startswith("Error")]) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("signum", cases([signal.SIGTERM, signal.SIGUSR1], ci=1))
def test_a_signal_for_everyone_still_leaves_time_to_deliver(
    signum: int, server: Server, proxy: Proxy, images: Path, tmp_path: Path
) -> None:
    """Slurm signals each process of a step and `torchrun`, which forwards the signal; the server is slow, too."""
    scontrol_log, scontrol = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {scontrol_log}\n')
    scontrol.chmod(0o755)
    env = {
        "MLFLOW_TRACKING_URI": proxy.uri,
        "SLURM_JOB_ID": "4711",
        "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
    }
    seldom = ("--save-interval", 1000, "--val-interval", 1000)
    rest = ("--requeue", "--save-dir", "m", "--run-name", f"signal {signum}")
    words = options(images, "--total-iters", 2000, *seldom, *rest)
    process = start(tmp_path / "work", "train", *words, env=env, under=torchrun(2))
    wait_for_iteration(process, 9)
    while any(entry.kind != "metrics" for entry in read_pending(tmp_path / "work" / "m").entries):
        time.sleep(0.1)  # what a run begins with has been delivered
    workers = [worker(process, rank) for rank in (0, 1)]
    proxy.mode = "slow"
    try:
        for receiver in (*workers, *([process] if signum == signal.SIGTERM else [])):
            receiver.send_signal(signum)
        if signum == signal.SIGUSR1:  # as if the step took long: no echo of a launcher is so late
            workers[1].suspend()
            time.sleep(1.5 * ECHO_SECONDS)
            workers[1].resume()
        process.communicate()
    finally:
        proxy.mode = "pass"
    client = MlflowClient(server.uri)
    experiments = [item.experiment_id for item in client.search_experiments()]
    [found] = client.search_runs(experiments, f"attributes.run_name = 'signal {signum}'")
    assert found.info.status == "KILLED"
    newest = list_checkpoints(tmp_path / "work" / "m")[0]
    assert json.loads(found.data.tags["checkpoint.latest"])["path"].endswith(newest.name)
    assert scontrol_log.exists() == (signum == signal.SIGUSR1)
