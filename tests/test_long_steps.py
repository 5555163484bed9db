"""A training run under `torchrun` in which one step fails in one process ends in one error line, and never hangs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.effort import cases
from tests.support.failing_step import STEPS
from tests.support.processes import torchrun
from tests.support.training import small_options

pytestmark = pytest.mark.long

PROGRAM = "tests.support.failing_step"
ROOT = Path(__file__).parents[1]

SYNCED = {"request", "config", "data", "state", "loop", "end"}
"""Steps whose failure all processes hear of, so that only the leader reports it; from others, a process is lost."""


def errors(log: Path) -> list[str]:
    """The error lines of one process; torchrun writes each process's stderr into a file."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("Error: ")]


@pytest.mark.parametrize("rank", cases([1, 0], ci=1))
@pytest.mark.parametrize("step", cases(list(STEPS)[::-1], ci=5))
def test_a_failing_step_ends_all_processes(step: str, rank: int, images: Path, tmp_path: Path) -> None:
    words = [*small_options(images), "--save-dir", tmp_path / "saved", "--no-system-metrics"]
    ended = subprocess.run(
        [
            *(sys.executable, *torchrun(2)),
            *("--log-dir", str(tmp_path / "logs"), "--redirects", "3"),
            *("-m", PROGRAM, "train", *map(str, words)),
        ],
        env={**os.environ, "FAIL": f"{step} {rank}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 1, ended.stderr
    leader, follower = (errors(*tmp_path.glob(f"logs/*/attempt_0/{number}/stderr.log")) for number in (0, 1))
    if step in SYNCED:
        assert follower == []
        assert len(leader) == 1
        assert f"injected into {step}" in leader[0]
        assert ("process 1 on " in leader[0]) == (rank == 1)
    else:
        of_failed, of_other = (leader, follower) if rank == 0 else (follower, leader)
        assert of_failed == [f"Error: injected into {step}"]
        assert len(of_other) <= 1, "torchrun may end it before it notices"
        assert all("has lost another process of this job" in line for line in of_other)
