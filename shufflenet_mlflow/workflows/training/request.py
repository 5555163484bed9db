"""The request of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shufflenet_mlflow.tracking.client import ActiveRun


@dataclass(frozen=True)
class TrainRequest:
    """The user's request, never rewritten; an `Attempt` holds what is found out about it."""

    options: Mapping[str, Any]
    """Fields of `RunConfig`, and `epochs`; only those that were given."""
    search: str | None = None
    """A search whose best network is trained, in the place of `model` and `choices`; see `found_network`."""
    resume: str = "auto"
    """`auto`, `none` or a checkpoint reference."""
    new_run: bool = False
    """Resume as a run of its own: a fork."""
    changed_data: bool = False
    """Resume on other images, or with another mean image, than the run began with."""
    take_over: bool = False
    """Resume a run that another process is writing to; that one stops."""
    save_dir: Path | None = None
    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    cache_dir: Path | None = None
    job: str | None = None
    """Name by which `auto` finds the run in MLflow where `save_dir` is empty."""
    grace: float | None = None
    """Seconds after a signal for bringing what is left to MLflow."""
    requeue: bool = False
    """After SIGUSR1, Slurm's warning of the end, ask Slurm to start the job again."""
    no_log_models: bool = False
    """Make no logged models of the best and the final checkpoint."""
    no_system_metrics: bool = False
    """Do not log how busy the machine is."""
    parent: ActiveRun | None = None
    """The run below which a new one is created; its ID may be provisional."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of a new run."""
