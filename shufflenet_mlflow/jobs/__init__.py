"""Whole jobs, put together from the parts: train a network, evaluate a checkpoint."""

from shufflenet_mlflow.jobs.evaluation import EvalRequest, EvalSummary, run_evaluation
from shufflenet_mlflow.jobs.training import TrainSummary, run_training

__all__ = ["EvalRequest", "EvalSummary", "TrainSummary", "run_evaluation", "run_training"]
