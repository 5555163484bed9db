"""The `shufflenet` command in its own process, alone or under `torchrun`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

Process = subprocess.Popen[str]

DOUBLE_PRECISION = (str(Path(__file__).with_name("double_precision.py")),)
"""The program that is the command in double precision."""


def start(
    folder: Path,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    under: tuple[str, ...] = (),
    program: tuple[str, ...] = ("-m", "shufflenet_mlflow"),
) -> Process:
    """Start `shufflenet ARGUMENTS` in `folder`, with its own cache folder and process group.

    Args:
        under: a launcher, such as `torchrun(2)`.
        program: what is started, the command or `DOUBLE_PRECISION`.
    """
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *under, *program, *map(str, arguments)],
        cwd=folder,
        # More threads would wait for each other, and round otherwise.
        env={**os.environ, "SHUFFLENET_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def torchrun(
    processes: int, *, max_restarts: int = 0, rendezvous: tuple[str, ...] = ("--standalone",)
) -> tuple[str, ...]:
    """Return the words that start `processes` processes of a program that follows them."""
    return (
        *("-m", "torch.distributed.run", *rendezvous),
        *("--nproc-per-node", str(processes), "--max-restarts", str(max_restarts)),
    )


def finish(process: Process, status: int = 0) -> dict[str, Any]:
    """Wait until it ends with `status`, and return what `--json` printed."""
    out, err = process.communicate()
    assert process.returncode == status, err
    document: dict[str, Any] = json.loads(out)
    return document


def wait_for_iteration(process: Process, iteration: int) -> None:
    """Read progress lines from its stderr until they reach that iteration."""
    assert process.stderr is not None
    for line in process.stderr:
        words = line.split()
        if words[:1] == ["iteration"] and int(words[1].partition("/")[0]) >= iteration:
            return
    pytest.fail("the process ended early")


def kill(process: Process) -> None:
    """Kill a process and everything that it has started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def worker(process: Process, rank: int) -> psutil.Process:
    """Return the process of that rank that a launcher has started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank) and "shufflenet_mlflow" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError(f"there is no process of rank {rank}")
