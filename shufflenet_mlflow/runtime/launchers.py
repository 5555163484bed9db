"""The launcher of this process, `torchrun`, Slurm or `mlflow run`: its attempts, and its end."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil

from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import PARENT, WARNING_SIGNAL, StopFlag
from shufflenet_mlflow.runtime.watching import watching

SCONTROL_SECONDS = 30.0

WATCH_SECONDS = 0.5
"""Seconds between two checks that the launcher is still there."""

_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Set by `torchrun` for the processes that it starts."""

ORPHAN_SECONDS = 5.0
"""Time beyond the grace period for a process whose launcher is gone."""


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
    if not may_restart() or (os.environ.get("GROUP_WORLD_SIZE") or "1") != "1":
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
    text = os.environ.get(variable) or "0"
    return int(text) if text.isdecimal() else 0


@contextmanager
def ended_with_launcher(stop: StopFlag) -> Iterator[None]:
    """Within the block, send this process SIGTERM once the `torchrun` or `mlflow run` that started it is gone.

    `mlflow run` does not pass on the signal that ends it, and a killed `torchrun` cannot: their processes would train
    on as orphans. A process that has not ended when the grace period is over, since it waits for another one, gets the
    signal again.
    """
    is_gone = _launcher_check()
    if is_gone is None:
        yield
        return
    terminated: list[float] = []

    def end_if_gone() -> bool:
        if not terminated:
            if is_gone():
                terminated.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
            return False
        if time.monotonic() - terminated[0] < stop.grace + ORPHAN_SECONDS:
            return False
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with watching(end_if_gone, seconds=WATCH_SECONDS, name="watching the launcher"):
        yield


def _launcher_check() -> Callable[[], bool] | None:
    """Return a function that tells whether the launcher is gone; None if nothing says that there is one.

    The parent of a process that was started with `nohup`, or by a shell that has ended, is gone as a rule.
    """
    launcher = _torchrun() if _TORCHRUN_VARIABLE in os.environ else _parent_mlflow_run()
    if launcher is None:
        return (lambda: os.getppid() != PARENT) if _TORCHRUN_VARIABLE in os.environ else None
    return lambda: not _is_alive(launcher)


def _torchrun() -> psutil.Process | None:
    """Return the `torchrun` that started this process, perhaps through a script; None if it cannot be told."""
    try:
        ancestor: psutil.Process | None = psutil.Process(PARENT)
        while ancestor is not None and _TORCHRUN_VARIABLE in ancestor.environ():
            ancestor = ancestor.parent()
        return ancestor if os.getppid() == PARENT else None
    except psutil.Error:
        return None


_BELOW_MLFLOW_RUN = bool(os.environ.get("MLFLOW_RUN_ID"))
"""The variable is taken out of the environment once the run is known."""


def is_below_mlflow_run() -> bool:
    """Whether `mlflow run` started this process, in the folder of the project."""
    return _BELOW_MLFLOW_RUN or bool(os.environ.get("MLFLOW_RUN_ID"))


def _parent_mlflow_run() -> psutil.Process | None:
    """Return the `mlflow run` that started this process; None if there is none."""
    if not os.environ.get("MLFLOW_RUN_ID"):
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
        self._wanted = wanted and (os.environ.get("RANK") or "0") == "0"
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
