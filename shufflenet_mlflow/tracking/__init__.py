"""MLflow: the run's life, its metrics and checkpoints, and their delivery."""

from shufflenet_mlflow.tracking.delivery import Deliverer
from shufflenet_mlflow.tracking.run import (
    CONFIG_TAG,
    JOB_TAG,
    AdoptedRun,
    KnownRun,
    adopted_run_id,
    adopted_tags,
    config_to_begin_with,
    find_job,
    look_up,
    make_run,
    new_run,
    reopen_run,
    require_not_beyond,
    run_to_adopt,
    wanted_experiment,
)
from shufflenet_mlflow.tracking.save import save_checkpoint
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore, lost_checkpoints
from shufflenet_mlflow.tracking.system import SystemMetrics

__all__ = [
    "CONFIG_TAG",
    "JOB_TAG",
    "AdoptedRun",
    "Deliverer",
    "KnownRun",
    "SystemMetrics",
    "TrackedMetrics",
    "TrackedStore",
    "TrackingSession",
    "adopted_run_id",
    "adopted_tags",
    "config_to_begin_with",
    "find_job",
    "look_up",
    "lost_checkpoints",
    "make_run",
    "new_run",
    "reopen_run",
    "require_not_beyond",
    "run_to_adopt",
    "save_checkpoint",
    "wanted_experiment",
]
