"""Put several runs side by side: what differs, and which is better."""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.compare.paired import Evaluation, Outcome, PairedTest, paired_test, read_outcomes
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.names import (
    EVALUATION_FOLDER,
    EVALUATION_SECTION,
    EVALUATION_TAG,
    PREDICTIONS_FILE,
    RESOLVED_PREFIX,
    SUMMARY_FILE,
    SYSTEM_SECTION,
)

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient, Run

logger = logging.getLogger(__name__)

HIGHER, LOWER = "higher", "lower"

_BETTER = {
    **dict.fromkeys(("top1", "top5", "val_top1", "mean_class_accuracy", "images_per_second"), HIGHER),
    **dict.fromkeys(("loss", "calibration_error"), LOWER),
}
"""Last part of a metric's name -> which values are better."""

_LEFT_OUT = (SYSTEM_SECTION, "train/lr", "epoch")
"""Metrics that do not say which run is better."""

CURVES = ("train/loss", "val/loss", "train/top1", "val/top1")

_POINTS = 2000
"""Points per curve; of more, evenly spaced ones are drawn."""


@dataclass(frozen=True)
class RunColumn:
    """One of the runs."""

    run_id: str
    name: str
    status: str
    started: int
    """Milliseconds since the epoch."""
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    evaluated: Mapping[str, str]
    """Name of a set of images in an evaluation's metrics -> digest of those images."""

    @property
    def short_id(self) -> str:
        """The first characters of the run's ID."""
        return self.run_id[:8]


@dataclass(frozen=True)
class ResultRow:
    """A metric of all runs; None for runs without it."""

    metric: str
    values: tuple[float | None, ...]
    best: tuple[int, ...]
    """Indices of the runs with the best value; empty if none is better, or no values are."""
    is_comparable: bool = True
    """False for evaluations of the same name on different images."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run over the course of training."""

    metric: str
    run: int
    iterations: tuple[int, ...]
    images: tuple[int, ...] | None
    """Images seen; None if the run does not say how large its batches are."""
    minutes: tuple[float, ...]
    """Minutes since the run started, pauses included."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[RunColumn, ...]
    differing: Mapping[str, tuple[str | None, ...]]
    """Parameter -> its value in each run, for those that differ."""
    results: tuple[ResultRow, ...]
    curves: tuple[Curve, ...]
    tests: tuple[PairedTest, ...]
    """Tests of the first run's evaluations against those of the others, on the same images."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `compare --json`."""
        return {
            "runs": [{"run_id": run.run_id, "name": run.name, "status": run.status} for run in self.runs],
            "differing_params": {name: list(values) for name, values in self.differing.items()},
            "results": [
                {
                    "metric": row.metric,
                    "values": list(row.values),
                    "best": [self.runs[i].run_id for i in row.best],
                    "comparable": row.is_comparable,
                }
                for row in self.results
            ],
            "paired_tests": [test.to_dict() for test in self.tests],
        }


def compare_runs(client: "MlflowClient", runs: "Sequence[Run]", *, curves: bool = True) -> Comparison:
    """Put runs side by side.

    Args:
        curves: read the history of their metrics too.

    Raises:
        TrackingError: MLflow did not answer.
    """
    columns = tuple(
        RunColumn(
            run.info.run_id,
            run.info.run_name,
            run.info.status,
            run.info.start_time,
            _resolved(run.data.params),
            dict(run.data.metrics),
            {
                tag.removeprefix(EVALUATION_TAG): digest
                for tag, digest in run.data.tags.items()
                if tag.startswith(EVALUATION_TAG)
            },
        )
        for run in runs
    )
    names = sorted({name for run in columns for name in run.params})
    values = {name: tuple(run.params.get(name) for run in columns) for name in names}
    evaluations = [list(_evaluations(client, run)) for run in runs]
    return Comparison(
        runs=columns,
        differing={name: row for name, row in values.items() if len(set(row)) > 1},
        results=_results(columns),
        curves=tuple(_curves(client, columns)) if curves else (),
        tests=tuple(_tests(client, evaluations)),
    )


def _resolved(params: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters in force: `mlflow run` logs its own spelling, and the resolved value beside it."""
    plain = {name: value for name, value in params.items() if not name.startswith(RESOLVED_PREFIX)}
    in_force = {name.removeprefix(RESOLVED_PREFIX): value for name, value in params.items() if name not in plain}
    return {name: value for name, value in {**plain, **in_force}.items() if value not in ("", "''")}


def _results(runs: Sequence[RunColumn]) -> tuple[ResultRow, ...]:
    names = sorted({name for run in runs for name in run.metrics if not name.startswith(_LEFT_OUT)})
    return tuple(
        _result(name, tuple(run.metrics.get(name) for run in runs), of_same_images=_of_same_images(name, runs))
        for name in names
    )


def _of_same_images(metric: str, runs: Sequence[RunColumn]) -> bool:
    """Whether an evaluation's metric is about the same images in all runs that have it; True for any other metric."""
    section = metric.rpartition("/")[0]
    if not section.startswith(EVALUATION_SECTION):
        return True
    data = section.removeprefix(EVALUATION_SECTION)
    return len({run.evaluated.get(data) for run in runs if metric in run.metrics}) <= 1


def _result(name: str, values: tuple[float | None, ...], *, of_same_images: bool) -> ResultRow:
    better = _BETTER.get(name.rpartition("/")[2])
    finite = {value for value in values if value is not None and math.isfinite(value)}
    best: tuple[int, ...] = ()
    if better is not None and len(finite) > 1 and of_same_images:
        winner = max(finite) if better == HIGHER else min(finite)
        best = tuple(index for index, value in enumerate(values) if value == winner)
    return ResultRow(name, values, best, of_same_images)


def _curves(client: "MlflowClient", runs: Sequence[RunColumn]) -> Iterator[Curve]:
    for metric in CURVES:
        for index, run in enumerate(runs):
            if metric not in run.metrics:
                continue
            with mlflow_errors(f"read {metric} of run {run.run_id}"):
                history = client.get_metric_history(run.run_id, metric)
            points = sorted(history, key=lambda point: point.step)
            points = [*points[: -1 : max(1, -(-len(points) // _POINTS))], *points[-1:]]
            if len(points) < 2:
                continue
            steps = tuple(point.step for point in points)
            batch = run.params.get("batch_size", "")
            yield Curve(
                metric,
                index,
                steps,
                tuple(step * int(batch) for step in steps) if batch.isdecimal() else None,
                tuple((point.timestamp - run.started) / 60_000 for point in points),
                tuple(point.value for point in points),
            )


def _evaluations(client: "MlflowClient", run: "Run") -> Iterator[Evaluation]:
    """Return the evaluations among a run's artifacts: for each set of images, that of the latest checkpoint."""
    run_id = run.info.run_id
    newest: dict[str, Evaluation] = {}
    with mlflow_errors(f"list the evaluations of run {run_id}"):
        folders = [
            folder.path
            for data in client.list_artifacts(run_id, EVALUATION_FOLDER)
            if data.is_dir
            for folder in client.list_artifacts(run_id, data.path)
            if folder.is_dir
        ]
    for folder in folders:
        try:
            summary = json.loads(_read(client, run_id, f"{folder}/{SUMMARY_FILE}"))
            found = Evaluation(
                run_id,
                summary["data"],
                summary["digest"],
                summary.get("root"),
                summary["checkpoint"],
                int(summary["iters"]),
                float(summary["metrics"]["top1"]),
                folder,
            )
        except (ValueError, KeyError, TypeError):  # truncated, or from a later version
            continue
        if found.digest not in newest or newest[found.digest].iters <= found.iters:
            newest[found.digest] = found
    yield from newest.values()


def _tests(client: "MlflowClient", evaluations: Sequence[Sequence[Evaluation]]) -> Iterator[PairedTest]:
    for first in evaluations[0]:
        same = [other for others in evaluations[1:] for other in others if other.digest == first.digest]
        before = _outcomes(client, first) if same else None
        for second in same:
            after = _outcomes(client, second)
            if before is not None and after is not None:
                yield paired_test(first, second, (before, after))


def _outcomes(client: "MlflowClient", evaluation: Evaluation) -> dict[str, Outcome] | None:
    """Return the outcome of each image by path; None if it cannot be read."""
    try:
        return read_outcomes(_read(client, evaluation.run_id, f"{evaluation.folder}/{PREDICTIONS_FILE}"))
    except (ValueError, KeyError, TypeError):
        logger.warning("run %s: cannot read its predictions in %s", evaluation.run_id, evaluation.folder)
        return None


def _read(client: "MlflowClient", run_id: str, artifact: str) -> str:
    """Read a small text artifact."""
    with mlflow_errors(f"read {artifact} of run {run_id}"), tempfile.TemporaryDirectory() as scratch:
        # Not as text: quoted names may contain line ends of any kind.
        return Path(client.download_artifacts(run_id, artifact, scratch)).read_bytes().decode()
