"""The launcher of this process, `torchrun`, Slurm or `mlflow run`: its attempts, and its end."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil

from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import WARNING_SIGNAL, StopFlag
from shufflenet_mlflow.runtime.watching import watching

SCONTROL_SECONDS = 30.0

WATCH_SECONDS = 0.5
"""Seconds between two checks that `mlflow run` is still there."""


def attempt() -> int:
    """Return how often the launcher has started this job before; 0 the first time, and without a launcher."""
    return max(_count("TORCHELASTIC_RESTART_COUNT"), _count("SLURM_RESTART_COUNT"))


def launch_name(options: str, *, requeue: bool) -> str | None:
    """Return a name that all attempts of this launch share; None if there is only one, or no such name is known.

    Args:
        options: the training's options, since a Slurm job may contain several trainings.
        requeue: whether Slurm will be asked for another attempt.
    """
    slurm, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "")
    if requeue and slurm:
        return f"slurm-{slurm}-{_digest(f'{step} {options}')[:6]}"
    if not may_restart() or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return None
    try:
        agent = psutil.Process(os.getppid())
        launch = f"{socket.gethostname()} {agent.pid} {agent.create_time()}"
    except psutil.Error:
        return None
    return f"torchrun-{_digest(launch)[:10]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def may_restart() -> bool:
    """Whether torchrun restarts the processes if one of them is lost."""
    return _count("TORCHELASTIC_MAX_RESTARTS") > 0


def is_last_attempt() -> bool:
    """Whether torchrun, if it started this process, starts none again when this one fails."""
    return _count("TORCHELASTIC_RESTART_COUNT") >= _count("TORCHELASTIC_MAX_RESTARTS")


def _count(variable: str) -> int:
    text = os.environ.get(variable, "0")
    return int(text) if text.isdecimal() else 0


@contextmanager
def ended_with_mlflow_run() -> Iterator[None]:
    """Within the block, send this process SIGTERM once the `mlflow run` that started it is gone.

    `mlflow run` does not pass on the signal that ends it, and its child would train on as an orphan.
    """
    parent = _parent_mlflow_run()
    if parent is None:
        yield
        return

    def end_if_gone() -> bool:
        gone = not _is_alive(parent)
        if gone:
            os.kill(os.getpid(), signal.SIGTERM)
        return gone

    with watching(end_if_gone, seconds=WATCH_SECONDS, name="watching mlflow run"):
        yield


def _parent_mlflow_run() -> psutil.Process | None:
    """Return the `mlflow run` that started this process; None if there is none."""
    if "MLFLOW_RUN_ID" not in os.environ:
        return None
    try:
        ancestors = psutil.Process().parents()
    except psutil.Error:
        return None
    for ancestor in ancestors:
        with suppress(psutil.Error):
            words = [os.path.basename(word) for word in ancestor.cmdline()]
            if any(pair == ("mlflow", "run") for pair in pairwise(words[:5])):
                return ancestor
    return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Requeue:
    """Asks Slurm to start this job again, once, from the first process of the job.

    Args:
        wanted: whether the user wants that.
    """

    def __init__(self, wanted: bool, reporter: Reporter) -> None:
        self._wanted = wanted and os.environ.get("RANK", "0") == "0"
        self._reporter = reporter

    def ask_if_warned(self, stop: StopFlag) -> None:
        """Ask if Slurm has announced the end; that may end this process at once.

        SIGTERM does not count: `scancel` sends it.
        """
        if self._wanted and stop.signum == WARNING_SIGNAL:
            self._wanted = False
            self._ask()

    def _ask(self) -> None:
        job, scontrol = os.environ.get("SLURM_JOB_ID", ""), shutil.which("scontrol")
        if not job or scontrol is None:
            problem = "scontrol is not on the PATH" if job else "SLURM_JOB_ID is not set"
            self._reporter.warn(f"--requeue: {problem}, so the job is not requeued")
            return
        self._reporter.note(f"asking Slurm to start job {job} again")
        try:
            completed = subprocess.run(  # noqa: S603 - found on the PATH
                [scontrol, "requeue", job], capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self._reporter.warn(f"--requeue: {error}")
            return
        if completed.returncode:
            reason = " ".join(completed.stderr.split()) or completed.returncode
            self._reporter.warn(f"--requeue: scontrol failed: {reason}")
