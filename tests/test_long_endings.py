"""Processes that cannot go on end, with their exit status, and keep what was trained."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from tests.support.command_line import small_options
from tests.support.effort import cases, only_in_full_run, repetitions
from tests.support.network import free_port
from tests.support.processes import Process, kill, start, torchrun, wait_for_iteration, worker

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(300)]

SECONDS = 30
"""In which a process that cannot go on ends."""


def words(images: Path, *more: object) -> list[object]:
    """Return a training that would take minutes and saves only at its end."""
    return ["train", *small_options(images), "--total-iters", 50_000, "--val-interval", 50_000, *more]


def training(folder: Path, images: Path, *more: object, **how: object) -> Process:
    process = start(folder, *words(images, "--save-interval", 50_000, "--save-dir", "m", *more), **how)  # type: ignore[arg-type]
    wait_for_iteration(process, 6)
    return process


def ended(process: Process, within: float = SECONDS) -> str:
    """Wait for its end, and return what it still printed on stderr."""
    try:
        _, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert "Traceback" not in err
    return err


def assert_saved(folder: Path, client: MlflowClient, status: str) -> None:
    [newest, *_] = list_checkpoints(folder / "m")
    assert verify_checkpoint(newest) is None
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == status


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert not alive


@pytest.mark.parametrize("case", range(repetitions(full=20, ci=1)))
def test_one_of_two_workers_is_killed(case: int, images: Path, client: MlflowClient, tmp_path: Path) -> None:
    process = training(tmp_path, images, "--workers", 2)
    workers = psutil.Process(process.pid).children()
    workers[case % 2].kill()
    err = ended(process)
    assert process.returncode == 1
    assert "Error: a data loading process died" in err.splitlines()[-1]
    assert "lower --workers" in err.splitlines()[-1]
    assert_saved(tmp_path, client, "FAILED")
    wait_until_gone(workers)


@only_in_full_run
def test_stopped_workers_do_not_keep_a_signal_waiting(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    process = training(tmp_path, images, "--workers", 2)
    workers = psutil.Process(process.pid).children()
    for one in workers:
        one.suspend()
    time.sleep(1)
    process.terminate()
    ended(process)
    assert process.returncode == 128 + signal.SIGTERM
    assert_saved(tmp_path, client, "KILLED")
    wait_until_gone(workers)


def test_workers_end_with_a_killed_process(images: Path, tmp_path: Path) -> None:
    process = training(tmp_path, images, "--workers", 2)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    wait_until_gone(workers)


def test_a_closed_terminal_saves(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    process = training(tmp_path, images)
    process.send_signal(signal.SIGHUP)
    err = ended(process)
    assert process.returncode == 128 + signal.SIGHUP
    assert "shufflenet train --resume " in err.splitlines()[-1]
    assert_saved(tmp_path, client, "KILLED")


@only_in_full_run
def test_nohup_trains_on(images: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from `nohup`
    try:
        process = training(tmp_path, images)
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    wait_for_iteration(process, 20)
    process.terminate()
    ended(process)
    assert process.returncode == 128 + signal.SIGTERM


@only_in_full_run
def test_nobody_reads_what_is_printed(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    process = start(tmp_path, "train", *small_options(images), "--save-dir", "m")
    assert process.stderr is not None
    assert process.stdout is not None
    process.stderr.close()
    process.stdout.close()
    assert process.wait(120) == 0
    assert_saved(tmp_path, client, "FINISHED")


@pytest.mark.parametrize("more", cases([(signal.SIGTERM, signal.SIGHUP), (signal.SIGTERM,)], ci=1))
def test_a_second_signal_says_how_to_go_on(
    more: tuple[signal.Signals, ...], images: Path, client: MlflowClient, tmp_path: Path
) -> None:
    process = training(tmp_path, images)
    for number in (signal.SIGINT, *more):
        process.send_signal(number)
        time.sleep(0.02 if len(more) > 1 else 0)
    sent = time.monotonic()
    err = ended(process)
    assert time.monotonic() - sent < 10
    assert process.returncode in [128 + number for number in (signal.SIGINT, *more)]
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert f"shufflenet train --resume {run.info.run_id}" in err.splitlines()[-1]
    assert run.info.status == "KILLED"


def test_processes_end_once_torchrun_is_killed(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    launcher = training(tmp_path, images, under=torchrun(2))
    ranks = [worker(launcher, 0), worker(launcher, 1)]
    os.kill(launcher.pid, signal.SIGKILL)
    wait_until_gone(ranks)
    launcher.communicate()
    assert_saved(tmp_path, client, "KILLED")


def test_a_full_disk_takes_what_is_printed(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        words_of = ["train", *small_options(images), "--save-dir", "m"]
        done = subprocess.run(
            [sys.executable, "-m", "shufflenet_mlflow", *map(str, words_of)],
            cwd=tmp_path,
            stdout=full,
            stderr=full,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0
    assert_saved(tmp_path, client, "FINISHED")


@only_in_full_run
def test_a_killed_rank_ends_the_others(images: Path, tmp_path: Path) -> None:
    launcher = training(tmp_path, images, under=torchrun(2))
    ranks = [worker(launcher, 0), worker(launcher, 1)]
    ranks[1].kill()
    wait_until_gone(ranks)
    launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signal.Signals(signum).name)
def test_a_signal_ends_the_wait_for_processes_that_never_come(
    signum: signal.Signals, images: Path, tmp_path: Path
) -> None:
    lonely = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = start(tmp_path, "train", *small_options(images), "--device", "cpu", env=lonely)
    deadline = time.monotonic() + 120
    while not is_listening(int(lonely["MASTER_PORT"])):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signum)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err


def is_listening(port: int) -> bool:
    """Whether a process waits for connections at that port."""
    return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in psutil.net_connections())


@only_in_full_run
def test_closed_streams(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    words = shlex.join(map(str, [sys.executable, "-m", "shufflenet_mlflow", "train", *small_options(images)]))
    ended = subprocess.run(
        ["sh", "-c", f"exec {words} --save-dir m <&- >&- 2>&-"], cwd=tmp_path, timeout=120, check=False
    )
    assert ended.returncode == 0
    assert_saved(tmp_path, client, "FINISHED")


@pytest.mark.parametrize("command", [("models",), ("models", "--json")])
@pytest.mark.parametrize("target", ["pipe", "full"])
def test_output_that_cannot_be_written(command: tuple[str, ...], target: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") if target == "full" else os.fdopen(writing, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "shufflenet_mlflow", *command],
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if target == "full":
        os.close(writing)
    status, err = done.returncode, done.stderr
    assert status == 1
    is_quiet = target == "pipe" and "--json" not in command
    assert err.count("\n") == (0 if is_quiet else 1)
    assert is_quiet or err.startswith("Error: standard output cannot be written to: ")
