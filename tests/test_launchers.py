"""Named jobs, and attempts under torchrun and Slurm: the same command resumes where the last one ended."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config import DEFAULT_EXPERIMENT
from shufflenet_mlflow.errors import ConfigError, ResumeError, TrackingError, UnresolvedError
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.launchers import attempt, launch_name
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.workflows.sync import run_sync
from shufflenet_mlflow.workflows.train import run_training
from shufflenet_mlflow.workflows.training import opening
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import choose
from shufflenet_mlflow.workflows.training.request import TrainRequest
from tests.support.command_line import Invoke
from tests.support.metrics import history, steps
from tests.support.training import Reporter, assert_same_end, request, run, run_until


def runs_of(client: MlflowClient) -> list[Any]:
    return list(client.search_runs([item.experiment_id for item in client.search_experiments()]))


class Death(BaseException):
    """An end for which nothing is saved, as with SIGKILL."""


def die_at(iteration: int) -> Reporter:
    def die(phase: str, done: int) -> None:
        if (phase, done) == ("training", iteration):
            raise Death

    return Reporter(die)


def move_away(folder: str) -> None:
    """Remove what another machine would not have."""
    if Path(folder).exists():
        os.rename(folder, f"{folder}-of-another-machine-{len(list(Path().iterdir()))}")


def test_a_job_resumes_by_its_name_on_another_machine(
    images: Path, client: MlflowClient, tmp_path: Path, uninterrupted: Any
) -> None:
    stopped = run_until(images, "training", 5, "--job", "pets-1")
    assert stopped.save_dir == Path("models/pets-1")
    assert client.get_run(stopped.run_id).data.tags["job"] == "pets-1"
    move_away("models")
    resumed = run(images, "--job", "pets-1", "--cache-dir", tmp_path / "cache", "--workers", 1)
    assert resumed.run_id == stopped.run_id
    assert_same_end(client, resumed, uninterrupted)
    assert run(images, "--job", "pets-1").was_complete
    assert run(images, "--job", "pets-2", "--total-iters", 2, "--val-interval", 2).run_id != stopped.run_id


def test_a_job_that_died_before_its_first_checkpoint_begins_the_same_run(
    images: Path, client: MlflowClient, uninterrupted: Any
) -> None:
    with pytest.raises(Death):
        run(images, "--job", "early", reporter=die_at(3))
    move_away("models")
    resumed = run(images, "--job", "early")
    assert [found.info.run_id for found in runs_of(client)] == [resumed.run_id]
    assert_same_end(client, resumed, uninterrupted)


def test_a_job_that_began_with_other_options_is_another_run(images: Path, client: MlflowClient) -> None:
    """Nothing is lost: the first run had no checkpoint."""
    with pytest.raises(Death):
        run(images, "--job", "early", reporter=die_at(3))
    move_away("models")
    run(images, "--job", "early", "--lr", 0.01)
    assert len(runs_of(client)) == 2


@pytest.mark.long
def test_a_run_without_a_checkpoint_restarts_by_its_id(images: Path, client: MlflowClient, uninterrupted: Any) -> None:
    """The ID is enough: options, classes and images come from the run."""
    with pytest.raises(Death):
        run(images, reporter=die_at(3))
    [died] = runs_of(client)
    move_away("models")
    with pytest.raises(ResumeError, match=r"the run cannot be continued with changed --lr \(0.02 -> 0.5\)"):
        run_training(TrainRequest({"lr": 0.5}, resume=died.info.run_id), reporter=Reporter(), stop=StopFlag())
    with pytest.raises(UnresolvedError, match="has no checkpoint.latest; among its artifacts are no checkpoints"):
        run(images, "--resume", died.info.run_id, "--new-run")
    run(images, "--total-iters", 2, "--val-interval", 2, "--save-dir", "used")
    with pytest.raises(ResumeError, match="--save-dir 'used' holds checkpoints of another run"):
        run(images, "--resume", died.info.run_id, "--save-dir", "used")
    resumed = run_training(TrainRequest({}, resume=died.info.run_id), reporter=Reporter(), stop=StopFlag())
    assert resumed.run_id == died.info.run_id
    assert_same_end(client, resumed, uninterrupted)


def test_a_restarted_run_keeps_its_mean_image(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    """There is no checkpoint yet to take the mean image from, so it is read again."""
    mean = tmp_path / "mean.npy"
    np.save(mean, np.full((32, 32, 3), 100, np.float32))
    options = {**request(images).options, "model": "shufflenet_v2_large", "mean_image": str(mean)}
    attempt = Attempt(resume="auto", is_fork=False, save_dir=None, job=None, inherited=options)
    assert choose(TrainRequest({}), attempt, World()).preprocess.mean_image is not None


def test_another_micro_batch_size_is_not_called_rounding(images: Path) -> None:
    """Another division changes which images batch normalisation sees together."""
    stopped = run_until(images, "training", 5, "--save-dir", "models")
    path = list_checkpoints(stopped.save_dir)[0]
    payload = read_checkpoint(path)
    payload["environment"]["parts"] = 4
    torch.save(payload, path)
    path.with_name(path.name + ".json").unlink()
    reporter = Reporter()
    run(images, "--save-dir", "models", reporter=reporter)
    expected = "divided into 1 micro-batch, and were into 4: batch normalisation sees different images together"
    assert any(expected in warning for warning in reporter.warnings)


def test_local_checkpoints_that_are_current_are_not_downloaded(images: Path, tmp_path: Path) -> None:
    stopped = run_until(images, "training", 5)
    cache = tmp_path / "cache"
    resumed = run(images, "--resume", stopped.run_id, "--cache-dir", cache)
    assert resumed.result.iters == 12
    assert not (cache / "runs").exists()


def test_a_job_is_forked_by_its_name(images: Path, client: MlflowClient) -> None:
    """From then on the job's name means the fork."""
    stopped = run_until(images, "training", 5, "--job", "pets")
    with pytest.raises(ResumeError, match="pass --new-run"):
        run(images, "--job", "pets", "--lr", 0.01)
    fork = run_until(images, "training", 9, "--job", "pets", "--lr", 0.01, "--new-run")
    assert fork.run_id != stopped.run_id
    assert client.get_run(fork.run_id).data.tags["resumed.from_run"] == stopped.run_id
    assert run(images, "--job", "pets", "--lr", 0.01).run_id == fork.run_id
    assert client.get_run(stopped.run_id).info.status == "KILLED"


@pytest.mark.parametrize("options", [[], ["--job", "pets"], ["--save-dir", "empty"]])
def test_forking_needs_a_checkpoint(options: list[object], images: Path, client: MlflowClient) -> None:
    with pytest.raises(ConfigError, match="--new-run: nothing was found to fork; name a checkpoint with --resume"):
        run(images, "--new-run", *options)
    assert runs_of(client) == []


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x", "x" * 101])
def test_names_that_no_job_can_have(name: str, images: Path) -> None:
    with pytest.raises(ConfigError, match="--job"):
        run_training(TrainRequest({}, job=name), reporter=Reporter(), stop=StopFlag())


def test_an_unreachable_store_could_know_the_job(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="--resume none starts the job without"):
        run(images, "--job", "j", "--tracking-uri", "http://127.0.0.1:9")


def test_every_drift_is_recorded(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 5, "--save-dir", "models")
    run(images, "--save-dir", "models", "--workers", 1, "--save-interval", 6)
    drifted = json.loads(client.get_run(stopped.run_id).data.tags["drift.5"])
    assert drifted == {"workers": [0, 1], "save_interval": [5, 6]}


def test_a_change_of_rounding_is_reported(images: Path) -> None:
    stopped = run_until(images, "training", 5, "--save-dir", "models")
    path = list_checkpoints(stopped.save_dir)[0]
    reporter = Reporter()
    payload = read_checkpoint(path)
    payload["environment"]["threads"] = 7
    torch.save(payload, path)
    path.with_name(path.name + ".json").unlink()
    run(images, "--save-dir", "models", reporter=reporter)
    assert any("threads (7 -> 1); results are equal up to rounding" in text for text in reporter.notes)


# --- torchrun -------------------------------------------------------------------------------------------------------


def restarted(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Set the environment variables of torchrun with one process."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


def test_without_a_launcher_there_is_one_attempt() -> None:
    assert attempt() == 0
    assert launch_name("", requeue=False) is None
    assert launch_name("", requeue=True) is None


@pytest.mark.parametrize(("count", "rank", "documents"), [(0, 0, 0), (1, 0, 0), (2, 0, 1), (2, 1, 0)])
def test_a_job_prints_one_error_document(
    count: int, rank: int, documents: int, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its first process, in the last attempt."""
    restarted(monkeypatch, count)
    monkeypatch.setenv("RANK", str(rank))
    result = shufflenet("train", "--lr", 0, "--json")
    assert (result.exit_code, "--lr (=0.0) must be above 0" in result.stderr) == (2, True)
    assert [json.loads(line)["error"]["code"] for line in result.stdout.splitlines()] == ["option-lr"] * documents


def test_an_attempt_of_torchrun_goes_on_without_any_option(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    restarted(monkeypatch, 0)
    with pytest.raises(Death):
        run(images, reporter=die_at(3))
    restarted(monkeypatch, 1)
    with pytest.raises(Death):
        run(images, reporter=die_at(7))
    restarted(monkeypatch, 2)
    resumed = run(images)
    [found] = runs_of(client)
    assert (found.info.run_id, found.data.tags["resumed.from_iters"]) == (resumed.run_id, "5")
    assert_same_end(client, resumed, uninterrupted)
    restarted(monkeypatch, 0)  # the same command once more, and later, is another launch
    monkeypatch.setattr(os, "getppid", lambda: os.getpid())
    assert run(images, "--total-iters", 2, "--val-interval", 2).run_id != resumed.run_id


def test_an_attempt_of_torchrun_does_not_fork_again(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = run_until(images, "training", 2)
    fork = ["--resume", parent.run_id, "--new-run", "--save-dir", "fork"]
    restarted(monkeypatch, 0)
    with pytest.raises(Death):
        run(images, *fork, reporter=die_at(7))
    restarted(monkeypatch, 1)
    assert run(images, *fork).run_id != parent.run_id
    assert len(runs_of(client)) == 2
    assert steps(client, parent.run_id, "train/loss") == [2]


def test_a_forks_attempts_are_one_fork(images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder or a name, and one attempt on another disk."""
    parent = run_until(images, "training", 2)
    fork = ["--resume", parent.run_id, "--new-run", "--lr", 0.01]
    restarted(monkeypatch, 0)
    with pytest.raises(Death):
        run(images, *fork, reporter=die_at(7))
    move_away("models")
    restarted(monkeypatch, 1)
    ended = run(images, *fork)
    assert len(runs_of(client)) == 2
    assert client.get_run(ended.run_id).data.tags["resumed.from_iters"] == "5"
    assert steps(client, ended.run_id, "train/loss") == [4, 6, 8, 10, 12]


def test_attempts_without_a_server_are_one_run(
    images: Path, monkeypatch: pytest.MonkeyPatch, client: MlflowClient, uninterrupted: Any
) -> None:
    """The server is unreachable throughout; one attempt dies before its first checkpoint, one after it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unreachable = ["--tracking-uri", "http://127.0.0.1:9", "--grace", 0]
    monkeypatch.setattr("shufflenet_mlflow.tracking.delivery.GIVE_UP_SECONDS", 0.1)
    for number, iteration in enumerate((3, 7)):
        restarted(monkeypatch, number)
        with pytest.raises(Death):
            run(images, *unreachable, reporter=die_at(iteration))
    restarted(monkeypatch, 2)
    ended = run(images, *unreachable)
    assert ended.result.iters == 12
    assert ended.run_id is None
    uri = os.environ["MLFLOW_TRACKING_URI"]
    synced = run_sync(ended.save_dir, dry_run=False, tracking_uri=uri, reporter=Reporter(), stop=StopFlag())
    [found] = runs_of(client)
    assert (found.info.run_id, found.info.status) == (synced.run_id, "FINISHED")
    assert history(client, found.info.run_id)["train/loss"] == uninterrupted[1]["train/loss"]


def test_several_machines_need_a_name(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restarted(monkeypatch, 0)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    reporter = Reporter()
    run(images, "--total-iters", 2, "--val-interval", 2, reporter=reporter)
    assert any("--job NAME makes it resume" in text for text in reporter.warnings)


# --- `mlflow run` ---------------------------------------------------------------------------------------------------


def test_a_container_that_is_started_again_continues_the_run_it_was_given(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    """Kubernetes restarts a failed pod with the same `MLFLOW_RUN_ID` and an empty disk."""
    run_id = client.create_run(client.create_experiment("by mlflow run")).info.run_id
    for iteration in (3, 7):  # before the first checkpoint, and after it
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        with pytest.raises(Death):
            run(images, reporter=die_at(iteration))
        move_away("models")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    resumed = run(images)
    assert resumed.run_id == run_id
    assert len(runs_of(client)) == 1
    assert client.get_run(run_id).data.tags["resumed.from_iters"] == "5"
    assert_same_end(client, resumed, uninterrupted)


def test_the_same_where_mlflow_was_told_no_experiment(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    """Then the run is in `shufflenet`, and the one in `Default` that MLflow made leads to it."""
    made = client.create_run("0").info.run_id
    for iteration in (3, 7, None):
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        if iteration is not None:
            with pytest.raises(Death):
                run(images, reporter=die_at(iteration))
            move_away("models")
    resumed = run(images)
    [found] = client.search_runs([client.get_experiment_by_name("shufflenet").experiment_id])
    assert found.info.run_id == resumed.run_id
    assert found.data.tags["resumed.from_iters"] == "5"
    ended = client.get_run(made)
    assert (ended.info.status, ended.data.tags["continues.run"]) == ("FINISHED", resumed.run_id)
    assert_same_end(client, resumed, uninterrupted)


# --- Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a Slurm job with a `scontrol` that records its arguments."""
    log = tmp_path / "asked"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ ! -e {tmp_path}/broken ] || {{ echo no such job >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return log


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGUSR1")
def test_slurm_is_asked_to_start_the_job_again(
    images: Path, client: MlflowClient, slurm: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    stopped = run_until(images, "training", 5, "--requeue", by=signal.SIGUSR1)
    assert slurm.read_text() == "requeue 4711\n"
    assert client.get_run(stopped.run_id).info.status == "KILLED"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    resumed = run(images, "--requeue")
    assert resumed.run_id == stopped.run_id
    assert_same_end(client, resumed, uninterrupted)
    assert slurm.read_text() == "requeue 4711\n"


def test_two_trainings_in_one_job_of_slurm(images: Path, slurm: Path) -> None:
    short = ["--total-iters", 2, "--val-interval", 2, "--requeue"]
    first = run(images, *short, "--lr", 0.01)
    assert run(images, *short, "--lr", 0.02).run_id != first.run_id


def test_a_signal_before_training_requeues(images: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: Any, **_named: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr("shufflenet_mlflow.data.datasets.list_images", interrupted)
    with StopFlag() as stop, pytest.raises(StopRequested):
        run(images, "--requeue", stop=stop)
    assert slurm.read_text() == "requeue 4711\n"


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_cancelled_jobs_are_not_requeued(by: int, images: Path, slurm: Path) -> None:
    run_until(images, "training", 2, "--requeue", by=by)
    assert not slurm.exists()


def test_a_failed_requeue_is_reported(images: Path, slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()

    def pull(phase: str, done: int) -> None:
        if (phase, done) == ("training", 2):
            signal.raise_signal(signal.SIGUSR1)

    reporter = Reporter(pull)
    with StopFlag() as stop:
        run(images, "--requeue", reporter=reporter, stop=stop)
    assert reporter.warnings == ["--requeue: scontrol failed: no such job"]


# --- signals --------------------------------------------------------------------------------------------------------


def test_the_grace_period_is_checked(images: Path) -> None:
    with pytest.raises(ConfigError, match=r"--grace \(=-1.0\) must be at least 0"):
        run(images, "--grace", -1)


def test_without_grace_nothing_is_awaited(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    """Undelivered entries stay in the journal, and the run is resumed with them."""
    stopped = run_until(images, "training", 6, "--save-dir", "m", "--grace", 0, by=signal.SIGUSR1)
    assert stopped.result.checkpoint == Path("m/checkpoint-000006.pth.tar")
    resumed = run(images, "--save-dir", "m")
    assert resumed.run_id == stopped.run_id
    assert steps(client, resumed.run_id, "train/loss") == [2, 4, 6, 8, 10, 12]


def test_a_signal_while_the_data_is_listed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been created by then, so the process may end anywhere."""
    import shufflenet_mlflow.data.datasets as planning

    listed = planning.list_images

    def interrupted(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return listed(*arguments, **named)

    monkeypatch.setattr(planning, "list_images", interrupted)
    with StopFlag() as stop, pytest.raises(StopRequested):
        run(images, stop=stop)
    assert not Path("models").exists()


def test_a_signal_while_the_run_is_made_leaves_it_killed(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run exists by then, so its status has to be set."""
    make_run = opening.make_run

    def interrupted(*arguments: Any, **named: Any) -> Any:
        run_id = make_run(*arguments, **named)
        signal.raise_signal(signal.SIGTERM)
        return run_id

    monkeypatch.setattr(opening, "make_run", interrupted)
    with StopFlag() as stop:
        summary = run(images, "--save-dir", "m", stop=stop)
    assert (summary.result.iters, summary.result.stopped_by) == (0, signal.SIGTERM)
    assert client.get_run(summary.run_id).info.status == "KILLED"


def test_an_empty_variable_is_none(
    small_train: Callable[..., dict[str, Any]], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job scripts and CI systems set variables that have no value."""
    names = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in (*names, "RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE", "SHUFFLENET_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    run_id = small_train("--total-iters", 1)["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_experiment(client.get_run(run_id).info.experiment_id).name == DEFAULT_EXPERIMENT
