"""Runs with curves and evaluations, written to MLflow without training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

START = 1_700_000_000_000
"""Milliseconds since the epoch at which every run began."""


def record_run(
    client: MlflowClient,
    name: str,
    *,
    accuracy: float,
    params: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    iterations: Sequence[int] = (100, 200, 300, 400),
    status: str = "FINISHED",
) -> str:
    """Record a run whose validation accuracy rises to `accuracy`, at two iterations a second; return its ID."""
    experiment = client.get_experiment_by_name("shufflenet")
    experiment_id = experiment.experiment_id if experiment is not None else client.create_experiment("shufflenet")
    run_id = str(client.create_run(experiment_id, run_name=name, start_time=START).info.run_id)
    known = {"total_iters": 400, "epochs": 4, "batch_size": 8, "num_classes": 10, **(params or {})}
    for key, value in known.items():
        client.log_param(run_id, key, value)
    points = []
    for iteration in iterations:
        share = iteration / iterations[-1]
        values = {"train/top1": accuracy * share - 0.1, "train/loss": 2 - share, "val/top1": accuracy * share}
        for metric, value in {**values, "val/loss": 2 - accuracy * share}.items():
            points.append(Metric(metric, value, START + iteration * 500, iteration))
    last = {
        "best/val_top1": accuracy,
        "train/images_per_second": 1000 * accuracy,
        "macs": 41_234_567,
        "loss": 0.5,
    }
    points += [Metric(metric, value, START, iterations[-1]) for metric, value in {**last, **(metrics or {})}.items()]
    client.log_batch(run_id, points)
    client.set_terminated(run_id, status, end_time=START + iterations[-1] * 500)
    return run_id


def record_evaluation(client: MlflowClient, run_id: str, root: Path, wrong: Mapping[str, str]) -> None:
    """Record an evaluation on the images below `root`, one folder a class.

    Args:
        wrong: path below `root` -> the class that the run takes that image for; all others it gets right.
    """
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    lines = ["path,label,predicted,probability,label_probability"]
    for path in paths:
        label = path.partition("/")[0]
        lines.append(f"{path},{label},{wrong.get(path, label)},0.9,0.1")
    top1 = 1 - len(wrong) / len(paths)
    summary = {"data": "pets", "digest": "d", "root": str(root), "checkpoint": "checkpoint-000400.pth.tar"}
    folder = "evaluation/pets/checkpoint-000400"
    client.log_text(run_id, "\n".join(lines) + "\n", f"{folder}/predictions.csv")
    client.log_text(run_id, json.dumps({**summary, "iters": 400, "metrics": {"top1": top1}}), f"{folder}/summary.json")
    client.log_metric(run_id, "eval/pets/top1", top1, step=400)
    client.set_tag(run_id, "evaluation.pets", "d")
