"""Whole jobs, put together from the parts: train a network, evaluate a checkpoint, average images.

Each is imported when it is first used: listing runs need not wait for what training needs.
"""

from typing import TYPE_CHECKING

from shufflenet_mlflow.lazily import exports

if TYPE_CHECKING:
    from shufflenet_mlflow.jobs.evaluation import EvalRequest, EvalSummary, run_evaluation
    from shufflenet_mlflow.jobs.mean import MeanSummary, run_mean
    from shufflenet_mlflow.jobs.training import TrainSummary, run_training

__all__ = [
    "EvalRequest",
    "EvalSummary",
    "MeanSummary",
    "TrainSummary",
    "run_evaluation",
    "run_mean",
    "run_training",
]

_HOMES = {
    "EvalRequest": "evaluation",
    "EvalSummary": "evaluation",
    "MeanSummary": "mean",
    "TrainSummary": "training",
    "run_evaluation": "evaluation",
    "run_mean": "mean",
    "run_training": "training",
}

__getattr__ = exports(__name__, _HOMES)
