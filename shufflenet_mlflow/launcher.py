"""What started this process, `torchrun` or Slurm: whether it is a further attempt, and asking for another."""

import hashlib
import os
import shutil
import socket
import subprocess

import psutil

from shufflenet_mlflow.reporting import Reporter

SCONTROL_SECONDS = 30.0


def attempt() -> int:
    """How often the launcher has started this job before; 0 the first time, and without a launcher."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return max(int(count) if count.isdecimal() else 0 for count in counts)


def launch_name(*, requeue: bool) -> str | None:
    """A name that all attempts of this launch have in common; None if there will be only one, or no such name is known.

    Args:
        requeue: Slurm is to be asked for another attempt.
    """
    slurm = os.environ.get("SLURM_JOB_ID", "")
    if requeue and slurm:
        return f"slurm-{slurm}"
    if not may_restart() or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return None
    try:
        agent = psutil.Process(os.getppid())
        launch = f"{socket.gethostname()} {agent.pid} {agent.create_time()}"
    except psutil.Error:
        return None
    return f"torchrun-{hashlib.sha256(launch.encode()).hexdigest()[:10]}"


def may_restart() -> bool:
    """Whether torchrun is going to start the processes again when one of them is lost."""
    most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return most.isdecimal() and int(most) > 0


def requeue(reporter: Reporter) -> None:
    """Ask Slurm to start this job again; it may end this process at once."""
    job, scontrol = os.environ.get("SLURM_JOB_ID", ""), shutil.which("scontrol")
    if not job or scontrol is None:
        lacking = "scontrol is not on the PATH" if job else "SLURM_JOB_ID is not set"
        reporter.warn(f"--requeue: {lacking}, so the job is not requeued")
        return
    reporter.note(f"asking Slurm to start job {job} again")
    try:
        asked = subprocess.run(  # noqa: S603 - found on the PATH
            [scontrol, "requeue", job], capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reporter.warn(f"--requeue: {error}")
        return
    if asked.returncode:
        reporter.warn(f"--requeue: scontrol said {' '.join(asked.stderr.split()) or asked.returncode}")
