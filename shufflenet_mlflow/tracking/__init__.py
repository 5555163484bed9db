"""MLflow: the run's life, its metrics and checkpoints, and their delivery. Each is imported when it is first used."""

from typing import TYPE_CHECKING

from shufflenet_mlflow.lazily import exports

if TYPE_CHECKING:
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

_HOMES = {
    "AdoptedRun": "run",
    "CONFIG_TAG": "run",
    "Deliverer": "delivery",
    "JOB_TAG": "run",
    "KnownRun": "run",
    "SystemMetrics": "system",
    "TrackedMetrics": "store",
    "TrackedStore": "store",
    "TrackingSession": "session",
    "adopted_run_id": "run",
    "adopted_tags": "run",
    "config_to_begin_with": "run",
    "find_job": "run",
    "look_up": "run",
    "lost_checkpoints": "store",
    "make_run": "run",
    "new_run": "run",
    "reopen_run": "run",
    "require_not_beyond": "run",
    "run_to_adopt": "run",
    "save_checkpoint": "save",
    "wanted_experiment": "run",
}

__getattr__ = exports(__name__, _HOMES)
