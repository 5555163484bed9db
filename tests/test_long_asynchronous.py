"""Asynchronous studies of real trainings: one worker that is killed at any moment, and two that share a study."""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.errors import StudyError
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.workflows.tune import show_study
from shufflenet_mlflow.workflows.tuning.request import TuneRequest
from tests.support.effort import cases, repetitions
from tests.support.forked import Child, fork
from tests.support.studies import (
    check_runs,
    decided,
    kill_all,
    killed_after,
    killed_before_delivery,
    study_request,
    tune,
    tune_in_child,
    undisturbed_study,
    without_ids,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

KILLS = repetitions(full=20, ci=5)
ASYNCHRONOUS = {"asynchronous": True, "sampler": "tpe"}


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[str, list[Any]]:
    """Return the decisions and the trials of a study that nothing has disturbed."""
    return undisturbed_study(images, tmp_path_factory.mktemp("undisturbed"), empty_database, **ASYNCHRONOUS)


def test_one_worker_killed_at_random(
    images: Path, undisturbed: tuple[str, list[Any]], client: MlflowClient, tmp_path: Path
) -> None:
    """The same decisions, byte for byte, whether the folder is still there or MLflow alone knows the study."""
    generator = random.Random(0)
    first = study_request(images, tmp_path / "0", **ASYNCHRONOUS)
    request, killed, lines = first, 0, None
    while killed < KILLS and lines is None:
        lines = killed_after(request, generator.uniform(0.3, 6.0), 1)
        if lines is None:
            killed += 1
            known = fork(lambda report: report(str(len(MlflowClient().search_experiments())))).expect_success()
            plan = first.plan if known == ["1"] or killed == 1 else None
            folder = request.save_dir if killed % 2 else tmp_path / str(killed)
            request = replace(first, plan=plan, save_dir=folder)
    if lines is None:
        lines = tune_in_child(request).expect_success()
    decisions, trials = undisturbed
    assert json.loads(lines[-1]) == decisions
    assert without_ids(json.loads(lines[-2])) == trials
    check_runs(client, 6)


@pytest.mark.parametrize("nth", cases([5, 1, 8], ci=1))
def test_killed_between_a_value_and_its_delivery(
    nth: int, images: Path, undisturbed: tuple[str, list[Any]], client: MlflowClient, tmp_path: Path
) -> None:
    request = study_request(images, tmp_path / "study", **ASYNCHRONOUS)
    folder = killed_before_delivery(request, nth)
    assert read_pending(folder).entries
    assert sum(len(trial.values) for trial in show_study(request).trials) == nth
    lines = tune_in_child(replace(request, plan=None)).expect_success()
    assert json.loads(lines[-1]) == undisturbed[0]
    check_runs(client, 6)


def test_two_workers(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    """Whatever they decide stands after they were killed, and at the end no trial is paused that could go on."""
    request = study_request(images, tmp_path / "study", trials=8, **ASYNCHRONOUS)
    both = [tune_in_child(request)]
    while not decisions_of(request):
        time.sleep(0.05)
    both.append(tune_in_child(request))
    while len(before := taken(decisions_of(request))) < 5 and all(map(is_alive, both)):
        time.sleep(0.05)
    kill_all([child.pid for child in both])
    assert {child.wait()[0] for child in both} == {signal.SIGKILL}
    before = taken(decisions_of(request))
    others = [tune_in_child(request), tune_in_child(request)]
    for child in others:
        child.expect_success()
    report = show_study(request)
    assert taken(report.decisions())[: len(before)] == before
    assert report.is_complete
    assert {trial.state for trial in report.trials} == {"complete", "pruned"}
    for rung in range(2):
        ranked = sorted((trial.values[rung], trial.number) for trial in report.trials if rung in trial.values)
        assert ranked
        for _, number in ranked[: len(ranked) // 2]:
            assert report.trials[number].decisions[rung] == "promoted"
    fork(lambda _report: check_runs(MlflowClient(), 8)).expect_success()
    elsewhere = tune(replace(request, plan=None, save_dir=tmp_path / "elsewhere"))
    assert taken(decided(elsewhere)) == taken(report.decisions())
    check_runs(client, 8)


def decisions_of(request: TuneRequest) -> str:
    """Return what has been decided so far; nothing before the study has begun."""
    try:
        return show_study(request).decisions()
    except StudyError:
        return ""


def is_alive(child: Child) -> bool:
    return psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE


def taken(decisions: str) -> list[dict[str, Any]]:
    """Return who was drawn and promoted, in order."""
    entries = [json.loads(line) for line in decisions.splitlines()]
    return [entry for entry in entries if entry["decision"] in ("sampled", "promoted")]
