"""Restore a study from MLflow where its record is gone: from its run and the runs of its trials."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.names import (
    STUDY_PARAMS_TAG,
    STUDY_PLAN_TAG,
    STUDY_STATE_TAG,
    STUDY_STEPS_TAG,
    STUDY_TAG,
    STUDY_TRIAL_TAG,
)
from shufflenet_mlflow.tracking.run import wanted_experiment
from shufflenet_mlflow.workflows.tuning.halving import PROMOTED, PRUNED, Trial, rungs_of

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import Run

_MOST_RUNS = 50_000
_MOST_EXPERIMENTS = 1000


@dataclass(frozen=True)
class Remains:
    """A study as far as MLflow knows it."""

    plan: StudyPlan
    run_id: str
    experiment: str
    """Name of the experiment."""
    params: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Trial -> options that were drawn for it."""
    run_ids: Mapping[int, str] = field(default_factory=dict)
    """Trial -> its run."""
    points: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """Trial -> iteration -> value of the study's metric."""
    statuses: Mapping[int, str] = field(default_factory=dict)
    """Trial -> MLflow's status of its run."""
    states: Mapping[int, str] = field(default_factory=dict)
    """Trial -> how it ended, in words."""
    steps: Mapping[int, Mapping[int, tuple[int, int]]] = field(default_factory=dict)
    """In an asynchronous study: trial -> rung -> place of the decision, and how many values it rests on."""

    def trials(self) -> Iterator[Trial]:
        """Yield the trials as far as their runs tell: the values at the rungs of the last one's length."""
        iters = sorted({step for points in self.points.values() for step in points})
        rungs = rungs_of(self.plan, iters[-1], self.plan.options.get("val_interval")) if iters else ()
        for number, params in sorted(self.params.items()):
            points = self.points.get(number, {})
            values = {rung: points[step] for rung, step in enumerate(rungs) if step in points}
            words = self.states.get(number, "").split()
            pruned = {max(values): PRUNED} if words[:1] == ["pruned"] and values else {}
            promoted = dict.fromkeys(range(max(values, default=0)), PROMOTED)
            yield Trial(
                number,
                params,
                values,
                {**promoted, **pruned},
                None,
                bool(words),
                {rung: rungs[rung] for rung in values},
                self.run_ids.get(number),
            )


def remains_of(store: Connection, study: str, experiment: str | None) -> Remains | None:
    """Return what MLflow knows of a study; None if there is no such study.

    Args:
        experiment: name of the experiment to look in; None for all.

    Raises:
        ConfigError: its plan is not understood.
        TrackingError: the store does not answer.
    """
    if not store.exists():
        return None
    with store.impatient():
        client = store.client
        names = _experiments(store, experiment)
        with mlflow_errors(f"look for the study {study!r}"):
            order = ["attributes.start_time ASC"]
            runs = client.search_runs(
                [*names], f"tags.`{STUDY_TAG}` = '{study}'", max_results=_MOST_RUNS, order_by=order
            )
    parent = next((run for run in runs if STUDY_PLAN_TAG in run.data.tags), None)
    if parent is None:
        return None
    plan = StudyPlan.from_json(parent.data.tags[STUDY_PLAN_TAG])
    trials = {number: run for run in reversed(runs) if (number := _number_of(run)) is not None}
    points: dict[int, dict[int, float]] = {}
    for number, run in trials.items():
        if plan.metric in run.data.metrics:
            with mlflow_errors(f"read the metrics of run {run.info.run_id}"):
                history = client.get_metric_history(run.info.run_id, plan.metric)
            points[number] = {int(point.step): float(point.value) for point in history}
    return Remains(
        plan,
        parent.info.run_id,
        names[parent.info.experiment_id],
        {number: _params_of(run) for number, run in trials.items()},
        {number: run.info.run_id for number, run in trials.items()},
        points,
        {number: run.info.status for number, run in trials.items()},
        {number: run.data.tags.get(STUDY_STATE_TAG, "") for number, run in trials.items()},
        {number: _steps_of(run) for number, run in trials.items()},
    )


def _experiments(store: Connection, experiment: str | None) -> dict[str, str]:
    """Return the experiments to look in, by ID."""
    if experiment is not None:
        name, experiment_id = wanted_experiment(store.client, experiment)
        return {} if experiment_id is None else {experiment_id: name}
    with mlflow_errors("list the experiments"):
        found = store.client.search_experiments(max_results=_MOST_EXPERIMENTS)
    return {one.experiment_id: one.name for one in found}


def _number_of(run: "Run") -> int | None:
    text = run.data.tags.get(STUDY_TRIAL_TAG, "")
    return int(text) if text.isdecimal() and STUDY_PARAMS_TAG in run.data.tags else None


def _params_of(run: "Run") -> dict[str, Any]:
    try:
        params = json.loads(run.data.tags[STUDY_PARAMS_TAG])
    except ValueError as error:
        raise ConfigError(
            f"the tag {STUDY_PARAMS_TAG} of run {run.info.run_id} is not understood: {error}",
            code="study-params-invalid",
        ) from error
    return dict(params)


def _steps_of(run: "Run") -> dict[int, tuple[int, int]]:
    """Return the places of a trial's decisions; none where they are not understood: they are then taken anew."""
    try:
        return {
            rung: (int(place), int(known))
            for rung, (place, known) in enumerate(json.loads(run.data.tags.get(STUDY_STEPS_TAG, "[]")))
        }
    except (ValueError, TypeError):
        return {}
