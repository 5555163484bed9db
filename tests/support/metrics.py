"""The points of a run's metrics, as MLflow has them."""

from mlflow import MlflowClient

from shufflenet_mlflow.tracking.names import SYSTEM_SECTION


def steps(client: MlflowClient, run_id: str, name: str) -> list[int]:
    """Return the steps of a metric's points, in the order they were logged."""
    return [point.step for point in client.get_metric_history(run_id, name)]


def values(client: MlflowClient, run_id: str, name: str) -> list[float]:
    """Return the values of a metric's points, ordered by step."""
    points = client.get_metric_history(run_id, name)
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def history(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return every metric's points in logged order, except those that measure time or the machine."""
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in client.get_run(run_id).data.metrics
        if name != "train/images_per_second" and not name.startswith(SYSTEM_SECTION)
    }
