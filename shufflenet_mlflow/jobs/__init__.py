"""Whole jobs, put together from the parts: train a network, evaluate a checkpoint, average images."""

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
