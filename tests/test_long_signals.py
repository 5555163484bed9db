"""Signals at any instant of a training: it ends as promised, and what was trained is kept."""

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from tests.support.command_line import small_options
from tests.support.effort import repetitions
from tests.support.processes import Process, kill, start

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(300)]

SECONDS = 60
"""In which a process ends after a signal, also on a busy machine."""
LATEST = 15.0
"""Seconds after the start of the last signal."""
APART = 0.1
"""Seconds between two signals."""

_random = random.Random(17)
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CASES = [
    (_NUMBERS[case % 3], 1 + (case + case // 3) % 3, round(_random.uniform(0, LATEST), 1))
    for case in range(repetitions(full=40, ci=3))
]
"""Signal, how many of them, seconds after the start."""


def finished(process: Process) -> str:
    try:
        return process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        kill(process)
        raise


def iterations_of(err: str) -> int:
    lines = [line.split() for line in err.splitlines()]
    return max((int(words[1].partition("/")[0]) for words in lines if words[:1] == ["iteration"]), default=0)


@pytest.mark.parametrize(("number", "times", "after"), CASES)
def test_signals_at_random_instants(
    number: signal.Signals, times: int, after: float, images: Path, client: MlflowClient, tmp_path: Path
) -> None:
    options = ["train", *small_options(images), "--total-iters", 400, "--val-interval", 50, "--save-interval", 100]
    process = start(tmp_path, *options, "--workers", 1, "--save-dir", "m")
    time.sleep(after)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for sent in range(times):
        if sent:
            time.sleep(APART if times == 2 else APART / 5)
        process.send_signal(number)
    began = time.monotonic()
    err = finished(process)
    took = time.monotonic() - began
    lines = err.splitlines()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    if process.returncode in (0, -number):  # it was over already, or had not begun
        assert all(run.info.status == "FINISHED" for run in runs), err
        return
    assert process.returncode == 128 + number, err
    assert len(runs) <= 1
    for run in runs:
        assert run.info.status in ("KILLED", "FINISHED"), err
        assert "shufflenet train --resume " in lines[-1] or "shufflenet train --resume " in err.splitlines()[-2], err
    if times > 1:
        assert took < 15
        return
    trained = iterations_of(err)
    if trained:
        newest, *_ = list_checkpoints(tmp_path / "m")
        assert read_checkpoint(newest)["iters"] >= trained  # progress is shown every second iteration
        assert runs
