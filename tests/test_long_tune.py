"""Studies that are killed, that have no server, and that several processes share."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.errors import ConfigError, StudyError
from shufflenet_mlflow.tracking import delivery
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.workflows.sync import run_sync_of_all
from shufflenet_mlflow.workflows.tune import show_study
from tests.support.backing_stores import Postgres, why_no_backing_stores
from tests.support.effort import cases, only_in_full_run, repetitions
from tests.support.forked import fork
from tests.support.mlflow_server import Server
from tests.support.network import free_port
from tests.support.processes import finish, start
from tests.support.studies import (
    STUDY,
    check_runs,
    decided,
    killed_after,
    killed_before_delivery,
    study_request,
    training,
    tune,
    tune_in_child,
    undisturbed_study,
    without_ids,
)
from tests.support.training import Reporter

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

KILLS = repetitions(full=20, ci=5)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[str, list[Any]]:
    """Return the decisions and the trials of a study that nothing has disturbed."""
    return undisturbed_study(images, tmp_path_factory.mktemp("undisturbed"), empty_database)


@pytest.mark.parametrize("workers", cases([2, 1], ci=1))
def test_killed_at_random_and_gone_on_with_from_an_empty_folder(
    workers: int, images: Path, undisturbed: tuple[str, list[Any]], client: MlflowClient, tmp_path: Path
) -> None:
    generator = random.Random(workers)
    first = study_request(images, tmp_path / "0")
    request, killed, lines = first, 0, None
    while killed < KILLS and lines is None:
        lines = killed_after(request, generator.uniform(0.3, 5.0), workers)
        if lines is None:
            killed += 1
            known = fork(lambda report: report(str(len(MlflowClient().search_experiments())))).expect_success()
            has_begun = known != ["1"]  # the experiment is there: the study's run may be, or a request for it
            request = replace(
                first, plan=None if has_begun and killed > 1 else first.plan, save_dir=tmp_path / str(killed)
            )
    if lines is None:
        lines = tune_in_child(request).expect_success()
    decisions, trials = undisturbed
    assert json.loads(lines[-1]) == decisions
    assert without_ids(json.loads(lines[-2])) == trials
    check_runs(client, 6)


@pytest.mark.parametrize("nth", cases([8, 10, 1, 6], ci=2))
def test_killed_between_a_value_and_its_delivery(
    nth: int, images: Path, undisturbed: tuple[str, list[Any]], client: MlflowClient, tmp_path: Path
) -> None:
    """The value is in the record; what MLflow has not heard, such as the run's end, is in the journal beside it."""
    request = study_request(images, tmp_path / "study")
    folder = killed_before_delivery(request, nth)
    assert "finish" in [entry.kind for entry in read_pending(folder).entries]
    values = [len(trial.values) for trial in show_study(request).trials]
    assert sum(values) == nth
    lines = tune_in_child(replace(request, plan=None)).expect_success()
    assert json.loads(lines[-1]) == undisturbed[0]
    assert json.loads(lines[-2])["pending"] == 0
    check_runs(client, 6)


@pytest.mark.parametrize("by", cases(["tune", "sync"], ci=1))
def test_a_study_without_a_server(
    by: str, images: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 0.0)
    away = f"http://127.0.0.1:{free_port()}"
    reporter = Reporter()
    request = study_request(images, tmp_path / "study", tracking_uri=away, trials=4)
    request = replace(request, experiment=f"delivered by {by}")
    summary = tune(request, reporter=reporter)
    assert summary.report.is_complete
    assert summary.to_dict()["parent_run_id"] is None
    assert summary.pending
    again = tune(replace(request, plan=None), reporter=Reporter())
    assert decided(again) == decided(summary)

    if by == "tune":  # what waits is delivered by going on, too, although nothing is left to do
        later = tune(replace(request, plan=None, tracking_uri=server.uri))
        assert (decided(later), later.pending) == (decided(summary), 0)
        assert all(trial["run_id"] for trial in later.to_dict()["trials"])
        check_runs(MlflowClient(server.uri), 4, request.experiment)
        return
    child = tmp_path / "study" / "trial-0001"
    with pytest.raises(Exception, match="its parent run has not been created yet"):
        run_sync_of_all(child, dry_run=False, tracking_uri=server.uri, reporter=Reporter(), stop=_stop())
    sent = run_sync_of_all(
        tmp_path / "study", dry_run=False, tracking_uri=server.uri, reporter=Reporter(), stop=_stop()
    )
    assert (sent.all_pending, sent.refused, len(sent.trials)) == ((), 0, 4)
    once_more = run_sync_of_all(
        tmp_path / "study", dry_run=False, tracking_uri=server.uri, reporter=Reporter(), stop=_stop()
    )
    assert once_more.all_sent == 0
    check_runs(MlflowClient(server.uri), 4, request.experiment)


@pytest.mark.usefixtures("client")
def test_a_record_that_is_damaged(images: Path, tmp_path: Path) -> None:
    """Trials whose end it has lost are looked for in their folders and in MLflow, and none has two runs."""
    request = study_request(images, tmp_path / "study", trials=3)
    decisions = tune_in_child(request).expect_success()[-1]  # whose claims end with it
    record = tmp_path / "study" / "study.jsonl"
    whole = record.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 37, 0):
        record.write_bytes(whole[:kept])
        assert tune_in_child(replace(request, plan=None)).expect_success()[-1] == decisions
        fork(lambda _report: check_runs(MlflowClient(), 3)).expect_success()
    record.write_bytes(random.Random(0).randbytes(3000))
    with pytest.raises(StudyError, match="is damaged; move it away, and the study is restored from MLflow"):
        tune(request)
    record.unlink()
    assert tune_in_child(replace(request, plan=None)).expect_success()[-1] == decisions


def test_images_that_lie_elsewhere_and_runs_that_are_gone(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "first")
    request = study_request(tmp_path / "first", tmp_path / "study", trials=3)
    stop = _stop()

    def pause(name: str, done: int) -> None:
        if (name, done) == ("trial 1: training", 2):
            stop.set(signal.SIGTERM)

    paused = Reporter(pause)
    assert not tune(request, reporter=paused, stop=stop).report.is_complete
    (tmp_path / "first").rename(tmp_path / "second")
    moved = study_request(tmp_path / "second", tmp_path / "study", trials=3)
    [run_id] = [run.info.run_id for run in all_runs(client) if run.data.tags.get("study.trial") == "1"]
    client.delete_run(run_id)
    with pytest.raises(StudyError, match=rf"trial 1: run {run_id} was deleted; .*trial-0001"):
        tune(moved)
    client.restore_run(run_id)
    image = tmp_path / "second" / "train" / "red" / "000.png"
    image.rename(tmp_path / "000.png")
    with pytest.raises(StudyError, match="cannot go on: .*; put that back, or begin a study under another name$"):
        tune(moved)
    (tmp_path / "000.png").rename(image)
    assert tune(moved).report.is_complete
    check_runs(client, 3)
    other = study_request(tmp_path / "second", tmp_path / "study", trials=3, training={"seed": 1})
    with pytest.raises(ConfigError, match="was begun otherwise"):
        tune(other)


def all_runs(client: MlflowClient) -> list[Any]:
    return list(client.search_runs([item.experiment_id for item in client.search_experiments()]))


def _stop() -> Any:
    from shufflenet_mlflow.runtime.signals import StopFlag

    return StopFlag()


def words(images: Path, *more: object) -> list[str]:
    """Return the words of `shufflenet tune` for the small study."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in training(images).items()]
    study = ["--study", STUDY, "--param", "lr=log:0.003:0.3", "--param", "momentum=0.5,0.9", "--trials", "6"]
    rungs = ["--rungs", "3", "--reduction", "2", "--generation", "3", "--metric", "val/loss", "--no-system-metrics"]
    return ["tune", *study, *rungs, *options, *map(str, more), "--json"]


@only_in_full_run
def test_helpers_of_one_command(
    images: Path, undisturbed: tuple[str, list[Any]], client: MlflowClient, tmp_path: Path
) -> None:
    process = start(tmp_path / "here", *words(images, "--max-parallel", 2, "--save-dir", tmp_path / "study"))
    document = finish(process)
    assert without_ids(document) == undisturbed[1]
    check_runs(client, 6)


def test_helpers_end_with_their_command(images: Path, tmp_path: Path) -> None:
    process = start(
        tmp_path / "here", *words(images, "--max-parallel", 2, "--trials", 50, "--save-dir", tmp_path / "s")
    )
    deadline = time.monotonic() + 120
    helpers: list[psutil.Process] = []
    while not helpers and time.monotonic() < deadline:
        time.sleep(0.2)
        helpers = psutil.Process(process.pid).children()
    assert helpers
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    gone, alive = psutil.wait_procs(helpers, timeout=60)
    assert (len(gone), alive) == (len(helpers), [])


@pytest.mark.skipif(why_no_backing_stores() is not None, reason=str(why_no_backing_stores()))
def test_two_workers_share_a_study_on_postgresql(
    images: Path, undisturbed: tuple[str, list[Any]], client: MlflowClient, tmp_path: Path
) -> None:
    postgres = Postgres()
    try:
        both = [
            start(
                tmp_path / name,
                *words(images, "--save-dir", tmp_path / name / "study", "--cache-dir", tmp_path / "cache"),
                env={"SHUFFLENET_STORAGE": postgres.uri},
            )
            for name in ("one", "other")
        ]
        trained = [tmp_path / "one" / "study" / "trial-0000", tmp_path / "other" / "study" / "trial-0000"]
        deadline = time.monotonic() + 200
        while not any(folder.exists() for folder in trained) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        victim = 0 if trained[0].exists() else 1
        os.kill(both[victim].pid, signal.SIGKILL)
        both[victim].communicate()
        document = finish(both[1 - victim])
        assert without_ids(document) == undisturbed[1]
        check_runs(client, 6)
        assert "pg-secret" not in json.dumps([run.to_dictionary() for run in client.search_runs(["0", "1"])])
    finally:
        postgres.close()
