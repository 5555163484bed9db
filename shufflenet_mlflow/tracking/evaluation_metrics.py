"""Log the metrics of an evaluation to its run and, at the same time, to the logged model that was evaluated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.messages import now_ms
from shufflenet_mlflow.tracking.target import RunTarget


@dataclass(frozen=True)
class EvaluatedModel:
    """A logged model, and the images that it was evaluated on."""

    model_id: str
    dataset_name: str
    dataset_digest: str


def log_results(target: RunTarget, values: Mapping[str, float], step: int, model: EvaluatedModel | None) -> None:
    """Log one point of each metric; a point that the run already has is not repeated.

    Raises:
        TrackingError: MLflow did not answer.
    """
    from mlflow.entities import Metric

    known = target.read().data.metrics
    model_fields = vars(model) if model is not None else {}
    with mlflow_errors(f"log metrics of run {target.run_id}"):
        metrics = []
        for name, value in values.items():
            timestamp = now_ms()
            if _is_same(known.get(name), value):  # an identical point, which the run keeps once
                history = target.client.get_metric_history(target.run_id, name)
                same = [point.timestamp for point in history if point.step == step and _is_same(point.value, value)]
                timestamp = same[-1] if same else timestamp
            metrics.append(Metric(name, value, timestamp, step, run_id=target.run_id, **model_fields))
        target.client.log_batch(target.run_id, metrics=metrics)


def log_input_model(target: RunTarget, model_id: str) -> None:
    """Log a model as an input of the run.

    Raises:
        TrackingError: MLflow did not answer.
    """
    from mlflow.entities import LoggedModelInput

    with mlflow_errors(f"name the model of run {target.run_id}"):
        target.client.log_inputs(target.run_id, models=[LoggedModelInput(model_id)])


def _is_same(one: float | None, other: float) -> bool:
    """Whether two values are equal, also if both are NaN."""
    return one == other or (one is not None and math.isnan(one) and math.isnan(other))
