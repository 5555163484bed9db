"""Put several runs side by side: what differs, and which is better."""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.compare.groups import GroupComparison
from shufflenet_mlflow.compare.paired import Evaluation, Outcome, PairedTest, paired_test, read_outcomes
from shufflenet_mlflow.evaluation.top5 import is_trivial
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
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
    **dict.fromkeys(("top1", "top5", "val_top1", "mean_class_accuracy"), HIGHER),
    **dict.fromkeys(("loss", "calibration_error", "bytes", "load_ms", "memory_mb"), LOWER),
}
"""Last part of a metric's name -> which values are better; the speed of a run is its machine's as much as its own."""

_NOT_RANKED = ("train/", "loss")
"""Beginnings of names: values of augmented batches of training images."""

_SECTIONS_FIRST = ("best", "val", "eval", "repeats", "study", "", "deploy", "data", "train")
"""First parts of names: results before costs; others follow."""
_NAMES_FIRST = ("top1", "val_top1", "mean_class_accuracy", "loss", "top5")
"""Last parts of names, within a section; others follow."""

_RENAMED = {"model/macs": "macs", "model/parameters": "parameters"}
"""Metrics of version 0.1 -> their names."""

_LEFT_OUT = (SYSTEM_SECTION, "train/lr", "epoch", "best/iters")
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
    ended: int | None
    """The same; None while it runs."""
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
    epochs: tuple[float, ...] | None
    """Passes over the training images; None if the run does not say how many iterations one takes."""
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
    groups: GroupComparison | None = None
    """Groups of repeated trainings: means and differences over the seeds."""

    @property
    def shown_results(self) -> tuple[ResultRow, ...]:
        """Return the results without top-5 accuracies that are 1 because there are so few classes."""
        return tuple(row for row in self.results if not self._is_trivial(row))

    def _is_trivial(self, row: ResultRow) -> bool:
        pairs = [(value, run) for value, run in zip(row.values, self.runs, strict=True) if value is not None]
        return bool(pairs) and all(is_trivial(row.metric, value, run.params) for value, run in pairs)

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
            **({} if self.groups is None else self.groups.to_dict()),
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
            run.info.end_time,
            _resolved(run.data.params),
            {_RENAMED.get(name, name): value for name, value in run.data.metrics.items()},
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
    known = {name for run in runs for name in run.metrics if not name.startswith(_LEFT_OUT)}
    names = sorted(known, key=_for_the_eye)
    return tuple(
        _result(name, tuple(run.metrics.get(name) for run in runs), of_same_images=_of_same_images(name, runs))
        for name in names
    )


def _for_the_eye(metric: str) -> tuple[int, str, int, str]:
    """Return the sort key that puts results before costs, and accuracy before loss."""
    section, _, name = metric.rpartition("/")
    return _place(section.partition("/")[0], _SECTIONS_FIRST), section, _place(name, _NAMES_FIRST), name


def _place(name: str, first: Sequence[str]) -> int:
    return first.index(name) if name in first else len(first)


def _of_same_images(metric: str, runs: Sequence[RunColumn]) -> bool:
    """Whether an evaluation's metric is about the same images in all runs that have it; True for any other metric."""
    section = metric.rpartition("/")[0]
    if not section.startswith(EVALUATION_SECTION):
        return True
    data = section.removeprefix(EVALUATION_SECTION)
    return len({run.evaluated.get(data) for run in runs if metric in run.metrics}) <= 1


def _result(name: str, values: tuple[float | None, ...], *, of_same_images: bool) -> ResultRow:
    better = None if name.startswith(_NOT_RANKED) else _BETTER.get(name.rpartition("/")[2])
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
            if not points:
                continue
            steps = tuple(point.step for point in points)
            per_epoch = _iterations_per_epoch(run)
            yield Curve(
                metric,
                index,
                steps,
                tuple(step / per_epoch for step in steps) if per_epoch is not None else None,
                tuple((point.timestamp - run.started) / 60_000 for point in points),
                tuple(point.value for point in points),
            )


def _iterations_per_epoch(run: RunColumn) -> float | None:
    """Return how many iterations a pass over the training images takes; None if the run does not say."""
    try:
        per_epoch = float(run.params["total_iters"]) / float(run.params["epochs"])
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return per_epoch if 0 < per_epoch < math.inf else None


def _evaluations(client: "MlflowClient", run: "Run") -> Iterator[Evaluation]:
    """Return a run's evaluations of checkpoints: for each set of images, that of the latest checkpoint."""
    newest: dict[str, Evaluation] = {}
    for found in all_evaluations(client, run):
        if found.export_sha256 is None and (found.digest not in newest or newest[found.digest].iters <= found.iters):
            newest[found.digest] = found
    yield from newest.values()


def all_evaluations(client: "MlflowClient", run: "Run") -> Iterator[Evaluation]:
    """Return the evaluations among a run's artifacts, of checkpoints and of exported files.

    Raises:
        TrackingError: MLflow did not answer.
    """
    run_id = run.info.run_id
    artifacts = RunArtifacts(client, run_id)
    with mlflow_errors(f"list the evaluations of run {run_id}"):
        folders = [folder for data in artifacts.folders(EVALUATION_FOLDER) for folder in artifacts.folders(data)]
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
                summary["export"]["sha256"] if "export" in summary else None,
            )
        except (ValueError, KeyError, TypeError):  # truncated, or from a later version
            continue
        yield found


def test_of(client: "MlflowClient", first: Evaluation, second: Evaluation) -> PairedTest | None:
    """Compare two evaluations on the same images; None if their predictions cannot be read.

    Raises:
        TrackingError: MLflow did not answer.
    """
    before, after = _outcomes(client, first), _outcomes(client, second)
    return paired_test(first, second, (before, after)) if before is not None and after is not None else None


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
    with tempfile.TemporaryDirectory() as scratch:
        # Not as text: quoted names may contain line ends of any kind.
        return RunArtifacts(client, run_id).download(artifact, Path(scratch)).read_bytes().decode()
