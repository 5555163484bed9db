"""`shufflenet compare`: run IDs in, tables and a page out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.checkpoints.references import is_exported
from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.errors import ConfigError, StudyError, UnresolvedError
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.names import STUDY_PLAN_TAG
from shufflenet_mlflow.tracking.run_ids import read_run
from shufflenet_mlflow.workflows.runs import find_run
from shufflenet_mlflow.workflows.tuning.restoring import remains_of

if TYPE_CHECKING:
    from shufflenet_mlflow.compare import Comparison, ExportComparison
    from shufflenet_mlflow.tracking.client import Run

MOST_TRIALS_SHOWN = 12
"""Trials of a study that are put side by side."""


@dataclass(frozen=True)
class CompareSummary:
    """A comparison, and the files that hold it."""

    comparison: "Comparison"
    written: tuple[Path, ...]


def run_comparison(
    refs: Sequence[str], *, out: Path | None, tracking_uri: str | None, study: str | None = None
) -> CompareSummary:
    """Put runs side by side.

    Args:
        refs: their IDs; those of repeated trainings are compared as groups, too.
        study: name of a study, the best of whose trials are compared.
        out: page to write, or folder for it; None for neither.

    Raises:
        ConfigError: there are fewer than two, or one twice.
        UnresolvedError: there is no such run.
        ExportError: the page cannot be written.
        TrackingError: MLflow did not answer.
    """
    if study is None:
        _require_several(refs)
    prepare_environment()
    from shufflenet_mlflow.compare import compare_groups, compare_runs, trials_of

    store = Connection(tracking_uri)
    runs = [find_run(store, ref) for ref in refs]
    if study is not None:
        parent = find_study(store, study)
        runs += _best_of(trials_of(store.client, parent), _plan_of(parent))
    plans = [_plan_of(run) for run in runs]
    groups = None
    if len(runs) > 1 and all(plan is not None and plan.repeats for plan in plans):
        groups = compare_groups(store.client, runs)
    _require_several([run.info.run_id for run in runs])
    comparison = replace(compare_runs(store.client, runs, curves=out is not None), groups=groups)
    if out is None:
        return CompareSummary(comparison, ())
    from shufflenet_mlflow.compare.page import write_page  # with Bokeh

    return CompareSummary(comparison, tuple(write_page(comparison, out)))


def run_export_comparison(files: Sequence[str], *, tracking_uri: str | None) -> list["ExportComparison"]:
    """Compare exported files, each with its checkpoint.

    Raises:
        ConfigError: there are runs among them.
        ExportError: a file cannot be read.
        UnresolvedError: its run is not known, or has no evaluations of both on the same images.
        TrackingError: MLflow did not answer.
    """
    others = [file for file in files if not is_exported(file)]
    if others:
        raise ConfigError(
            f"{others[0]} is not an exported file; compare files with their checkpoints, or runs with one another",
            code="compare-mixed",
        )
    prepare_environment()
    from shufflenet_mlflow.compare import compare_export
    from shufflenet_mlflow.export.exported import open_exported

    store, comparisons = Connection(tracking_uri), []
    for file in files:
        exported, _ = open_exported(Path(file))
        run_id = exported.text("run_id")
        if run_id is None:
            raise UnresolvedError(
                f"{file!r} does not say which run it is from; export a run's checkpoint", code="export-without-run"
            )
        comparisons.append(compare_export(store.client, read_run(store, run_id), exported.to_dict()))
    return comparisons


def _plan_of(run: "Run") -> StudyPlan | None:
    """Return the plan of the study whose run this is; None for any other run."""
    text = run.data.tags.get(STUDY_PLAN_TAG)
    if text is None:
        return None
    try:
        return StudyPlan.from_json(text)
    except ConfigError:  # of a later version, or edited
        return None


def find_study(store: Connection, study: str) -> "Run":
    """Return the run of a study.

    Raises:
        StudyError: MLflow knows no such study.
        TrackingError: it did not answer.
    """
    found = remains_of(store, study, None)
    if found is None:
        raise StudyError(
            f"there is no study {study!r} in MLflow; `shufflenet runs` lists what there is", code="study-not-in-mlflow"
        )
    return store.run(found.run_id)


def _best_of(trials: "list[Run]", plan: StudyPlan | None) -> "list[Run]":
    """Return the trials that came furthest, the best of them first."""

    def order(run: "Run") -> tuple[int, float]:
        value = run.data.metrics.get(plan.metric) if plan is not None else None
        if value is None or plan is None:
            return 2, 0.0
        return int(run.info.status != "FINISHED"), plan.rank(value)

    return sorted(trials, key=order)[:MOST_TRIALS_SHOWN]


def _require_several(ids: Sequence[str]) -> None:
    if len(ids) < 2:
        raise ConfigError(
            f"a comparison needs two runs or more, not {ids[0] if ids else 'none'} alone; `shufflenet runs` lists them",
            code="compare-needs-two-runs",
        )
    if repeated := sorted({run_id for run_id in ids if ids.count(run_id) > 1}):
        raise ConfigError(
            f"run {repeated[0]} is given twice; name another one to compare it with", code="run-given-twice"
        )
