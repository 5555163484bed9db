"""MLflow: the run's life, its metrics and checkpoints, and their delivery."""

from shufflenet_mlflow.tracking.delivery import Delivery
from shufflenet_mlflow.tracking.run import TrackedRun, adopted_run_id
from shufflenet_mlflow.tracking.save import save_checkpoint
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore

__all__ = [
    "Delivery",
    "TrackedMetrics",
    "TrackedRun",
    "TrackedStore",
    "adopted_run_id",
    "save_checkpoint",
]
