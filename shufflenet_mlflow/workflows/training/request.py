"""What the user asked a training run to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.tracking.run_ids import complete


@dataclass(frozen=True)
class TrainRequest:
    """What a user asked for."""

    options: Mapping[str, Any]
    """Fields of `TrainConfig`, and `epochs`; only those that were given."""
    resume: str = "auto"
    """`auto`, `none` or a checkpoint reference."""
    new_run: bool = False
    save_dir: Path | None = None
    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    cache_dir: Path | None = None
    job: str | None = None
    """Name by which `auto` finds the run in MLflow, where `save_dir` is empty."""
    grace: float | None = None
    """Seconds after a signal in which what is under way may be brought to MLflow."""
    requeue: bool = False
    """After SIGUSR1, by which Slurm announces the end, ask it to start the job again."""
    no_log_models: bool = False
    """Make no logged models of the best and the final checkpoint."""
    no_system_metrics: bool = False
    """Do not watch how busy the machine is."""
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the run that is begun again, because it has no checkpoint yet: holds for what is not given."""


def with_whole_ids(request: TrainRequest) -> TrainRequest:
    """The request, with whole run IDs where the first characters of one were given.

    Raises:
        UnresolvedError: no run begins so, or several do.
        TrackingError: MLflow did not answer.
    """
    options = dict(request.options)
    if options.get("init_from") is not None:
        options["init_from"] = str(complete(options["init_from"], request.tracking_uri))
    resume = request.resume
    if resume not in ("auto", "none"):
        resume = str(complete(resume, request.tracking_uri))
    return replace(request, options=options, resume=resume)
