"""Signals at random moments of every phase, in a real terminal: a checkpoint is saved in time, and the run resumes."""

import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from shufflenet_mlflow.runtime.signals import exit_status
from tests.support.command_line import small_options
from tests.support.effort import cases
from tests.support.images import write_images
from tests.support.metrics import steps
from tests.support.mlflow_server import Server
from tests.support.processes import finish, start
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(900)]

GRACE = 20
"""Seconds; the default of `--grace`."""

ITERATIONS = 24


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write enough validation images for a pass that takes a while."""
    root = tmp_path_factory.mktemp("many")
    write_images(root / "train", per_class=64)
    write_images(root / "val", per_class=200, seed=1)
    return root


class Terminal:
    """`shufflenet train` in its own terminal, where it shows the name of each phase."""

    def __init__(self, folder: Path, uri: str, *words: object) -> None:
        folder.mkdir()
        controller, terminal = pty.openpty()
        self.shown, self.text = controller, ""
        self.poll = select.poll()  # select() takes no descriptors above 1023
        self.poll.register(controller, select.POLLIN)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shufflenet_mlflow", "train", *map(str, words), "--json"],
            cwd=folder,
            env={**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            start_new_session=True,
        )
        os.close(terminal)

    def read(self, seconds: float) -> None:
        """Read what it shows for so many seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self.poll.poll(left * 1000):
                return
            try:
                data = os.read(self.shown, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self.text += data.decode(errors="replace")

    def wait_for(self, phase: str) -> None:
        """Wait until it shows the name of that phase."""
        deadline = time.monotonic() + 120
        while phase not in self.text:
            assert time.monotonic() < deadline, self.text[-2000:]
            assert self.process.poll() is None, self.text[-2000:]
            self.read(0.02)

    def end(self) -> tuple[int, str]:
        """Wait for its end, and return its exit status and stdout."""
        assert self.process.stdout is not None
        while self.process.poll() is None:
            self.read(0.05)
        self.read(0.1)
        os.close(self.shown)
        with self.process.stdout as printed:
            return self.process.returncode, printed.read()


def words(many_images: Path) -> list[object]:
    return [
        *(*small_options(many_images), "--total-iters", ITERATIONS, "--val-interval", 8, "--save-interval", 10),
        *("--save-dir", "m", "--grace", GRACE),
    ]


MOMENTS = [
    *(("training", signal.SIGUSR1), ("validating", signal.SIGTERM), ("re-estimating BN", signal.SIGINT)),
    *(("sending to MLflow", signal.SIGTERM), ("start-up", signal.SIGTERM)),
    *(("training", signal.SIGTERM), ("training", signal.SIGINT), ("validating", signal.SIGUSR1)),
    *(("re-estimating BN", signal.SIGTERM), ("sending to MLflow", signal.SIGUSR1)),
]
"""The first five have every phase and every signal."""


@pytest.mark.parametrize(("phase", "signum"), cases(MOMENTS, ci=5))
def test_a_signal_in_any_phase(
    phase: str, signum: int, server: Server, proxy: Proxy, many_images: Path, tmp_path: Path
) -> None:
    dice = random.Random(f"{phase} {signum}")
    if phase == "sending to MLflow":
        proxy.mode = "slow"
    try:
        terminal = Terminal(tmp_path / "here", proxy.uri, *words(many_images), "--run-name", f"{phase} {signum}")
        if phase == "start-up":
            terminal.read(dice.uniform(1.5, 2.2))
            assert "training" not in terminal.text
        else:
            terminal.wait_for(phase)
            terminal.read(dice.uniform(0, 0.3))
        sent = time.monotonic()
        terminal.process.send_signal(signum)
        status, out = terminal.end()
        took = time.monotonic() - sent
    finally:
        proxy.mode = "pass"
    assert status == exit_status(signum), terminal.text[-3000:]
    assert took < 2 * GRACE  # and what it takes to say how the run ended, through a slow proxy
    assert "Traceback" not in terminal.text
    client = MlflowClient(server.uri)
    if phase == "start-up":
        assert out == ""
        assert not list_checkpoints(tmp_path / "here" / "m")
        finish(start(tmp_path / "here", "train", *words(many_images), "--json", env={"MLFLOW_TRACKING_URI": proxy.uri}))
        return
    stopped: dict[str, Any] = json.loads(out)
    assert verify_checkpoint(tmp_path / "here" / stopped["checkpoint"]) is None
    complete = stopped["iters"] == ITERATIONS and "bnps" in stopped["checkpoint"]
    run_id = stopped["run_id"]
    if not stopped["pending"]:
        assert client.get_run(run_id).info.status == ("FINISHED" if complete else "KILLED")
        words_to_resume = ["--resume", run_id]
        folder = tmp_path / "there"
    else:
        words_to_resume = words(many_images)
        folder = tmp_path / "here"
    ended = finish(start(folder, "train", *words_to_resume, "--json", env={"MLFLOW_TRACKING_URI": server.uri}))
    assert (ended["run_id"], ended["iters"]) == (run_id, ITERATIONS)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert steps(client, run_id, "train/loss") == list(range(2, ITERATIONS + 1, 2))
    assert steps(client, run_id, "val/top1") == [8, 16, 24]


def test_a_second_signal_leaves_at_once_and_loses_nothing(
    server: Server, proxy: Proxy, many_images: Path, tmp_path: Path
) -> None:
    proxy.mode = "slow"
    try:
        terminal = Terminal(tmp_path / "here", proxy.uri, *words(many_images))
        terminal.wait_for("sending to MLflow")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.read(0.3)
        sent = time.monotonic()
        terminal.process.send_signal(signal.SIGTERM)
        status, _ = terminal.end()
    finally:
        proxy.mode = "pass"
    assert time.monotonic() - sent < 2
    assert status == 128 + signal.SIGTERM
    env = {"MLFLOW_TRACKING_URI": server.uri}
    ended = finish(start(tmp_path / "here", "train", *words(many_images), "--json", env=env))
    assert ended["iters"] == ITERATIONS
    client = MlflowClient(server.uri)
    assert steps(client, ended["run_id"], "train/loss") == list(range(2, ITERATIONS + 1, 2))


def test_the_phases_are_named_as_these_tests_expect() -> None:
    """Otherwise signals could arrive in another phase, unnoticed."""
    source = (Path(__file__).parent.parent / "shufflenet_mlflow").rglob("*.py")
    named = set(re.findall(r'phase\(\s*"([^"]+)"', "".join(path.read_text() for path in source)))
    assert {phase for phase, _ in MOMENTS} - {"start-up"} <= named
