"""Delivery to MLflow: in order, once, even if the server was unreachable from the start."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.checkpoints.folders import list_manifests
from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import JournalError, RefusedError, TrackingError
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import delivery, lease
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.delivery import Deliverer, Delivery
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
from shufflenet_mlflow.tracking.messages import Finish, MetricPoints, to_body
from shufflenet_mlflow.tracking.refused import REFUSED_NAME
from shufflenet_mlflow.tracking.run import make_run
from shufflenet_mlflow.tracking.target import RunTarget
from shufflenet_mlflow.tracking.trust import remember_store, uri_of_journal
from shufflenet_mlflow.tracking.uris import stored_uri
from shufflenet_mlflow.workflows.sync import run_sync
from shufflenet_mlflow.workflows.training import opening
from tests.support.command_line import Invoke, small_options
from tests.support.delivering import deliver_now
from tests.support.effort import only_in_full_run
from tests.support.metrics import steps
from tests.support.training import Reporter, assert_same_end, run


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("delivery")).info.run_id)


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def put(journal: Journal, run_id: str, *messages: Any) -> None:
    for message in messages:
        journal.append(run_id, message.kind, to_body(message))


def checkpoint(directory: Path, iters: int, val_top1: float | None = None) -> Checkpoint:
    state = {"state_dict": {"w": torch.full((5,), float(iters))}, "epoch": 1, "loss": 0.5}
    return Checkpoint.of(write_checkpoint(state, iters, directory=directory, val_top1=val_top1).manifest)


def tagged(client: MlflowClient, run_id: str, tag: str) -> int | None:
    tags = client.get_run(run_id).data.tags
    return json.loads(tags[tag])["iters"] if tag in tags else None


# ---------------------------------------------------------------- the commit


def test_file_then_record_then_points_then_pointers(
    client: MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    put_file, log_batch = RunArtifacts.put_file, MlflowClient.log_batch

    def put(me: RunArtifacts, path: Path) -> None:
        calls.append(path.name)
        put_file(me, path)

    def log(me: MlflowClient, run: str, metrics: Any = (), tags: Any = ()) -> None:
        calls.append(" ".join([*(metric.key for metric in metrics), *(tag.key for tag in tags)]))
        log_batch(me, run, metrics=metrics, tags=tags)

    monkeypatch.setattr(RunArtifacts, "put_file", put)
    monkeypatch.setattr(MlflowClient, "log_batch", log)
    checkpoint(tmp_path, 5, 0.5).send(RunTarget(client, run_id, tmp_path, is_new=True))
    name = "checkpoint-000005.pth.tar"
    assert calls == [name, f"{name}.json", f"epoch loss {BEST_TAG} {LATEST_TAG}"]


@pytest.mark.parametrize(
    ("owner", "broken"),
    [(RunArtifacts, "put_file"), (RunArtifacts, "write_manifest"), (MlflowClient, "log_batch")],
)
def test_no_pointer_moves_before_its_payload(
    owner: Any, broken: str, client: MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = RunTarget(client, run_id, tmp_path, is_new=True)
    checkpoint(tmp_path, 1, 0.1).send(target)
    second = checkpoint(tmp_path, 2, 0.9)
    with monkeypatch.context() as patch:

        def refuse(*_arguments: Any, **_keywords: Any) -> None:
            raise ConnectionError("Connection refused")

        patch.setattr(owner, broken, refuse)
        with pytest.raises(TrackingError, match="connection refused"):
            second.send(target)
    assert (tagged(client, run_id, LATEST_TAG), tagged(client, run_id, BEST_TAG)) == (1, 1)
    second.send(target)
    assert (tagged(client, run_id, LATEST_TAG), tagged(client, run_id, BEST_TAG)) == (2, 2)


def test_a_damaged_upload_is_not_committed(
    client: MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = checkpoint(tmp_path, 1)
    target = RunTarget(client, run_id, tmp_path, is_new=True)
    original = RunArtifacts.put_file

    def flip(artifacts: RunArtifacts, path: Path) -> None:
        original(artifacts, path)
        uploaded = Path(artifacts._local_folder() or "") / "checkpoints" / path.name
        data = bytearray(uploaded.read_bytes())
        data[len(data) // 2] ^= 1
        uploaded.write_bytes(data)

    monkeypatch.setattr(RunArtifacts, "put_file", flip)
    with pytest.raises(TrackingError, match="did not arrive intact: its SHA-256 there is"):
        message.send(target)
    assert LATEST_TAG not in client.get_run(run_id).data.tags


@pytest.mark.parametrize("listed", [{}, {"checkpoint-000001.pth.tar": 17}])
def test_elsewhere_the_size_is_confirmed(
    listed: dict[str, int], client: MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = checkpoint(tmp_path, 1)
    monkeypatch.setattr(RunArtifacts, "_local_folder", lambda _self: None)
    monkeypatch.setattr(RunArtifacts, "sizes", lambda _self: listed)
    with pytest.raises(TrackingError, match="did not arrive"):
        message.send(RunTarget(client, run_id, tmp_path, is_new=True))
    assert LATEST_TAG not in client.get_run(run_id).data.tags


def test_pointers_never_move_backwards(client: MlflowClient, run_id: str, tmp_path: Path) -> None:
    """An old journal is delivered after the run was resumed elsewhere."""
    target = RunTarget(client, run_id, tmp_path, is_new=True)
    checkpoint(tmp_path, 20, 0.8).send(target)
    for late in (checkpoint(tmp_path, 10, 0.7), checkpoint(tmp_path, 15, float("nan"))):
        late.send(target)
    assert (tagged(client, run_id, LATEST_TAG), tagged(client, run_id, BEST_TAG)) == (20, 20)
    checkpoint(tmp_path, 5, 0.9).send(target)
    assert (tagged(client, run_id, LATEST_TAG), tagged(client, run_id, BEST_TAG)) == (20, 5)
    assert len(RunArtifacts(client, run_id).manifests()) == 4
    Finish("KILLED", 1, 10).send(target)
    assert client.get_run(run_id).info.status == "RUNNING"
    Finish("FINISHED", 1, 20).send(target)
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("value", ['"0.5"', "NaN", "[]", "true"])
def test_an_edited_pointer_is_repaired(value: str, client: MlflowClient, run_id: str, tmp_path: Path) -> None:
    target = RunTarget(client, run_id, tmp_path, is_new=True)
    checkpoint(tmp_path, 1, 0.5).send(target)
    for tag in (BEST_TAG, LATEST_TAG):
        text = client.get_run(run_id).data.tags[tag]
        assert '"val_top1": 0.5' in text
        client.set_tag(run_id, tag, text.replace('"val_top1": 0.5', f'"val_top1": {value}'))
    checkpoint(tmp_path, 2, 0.25).send(target)
    assert (tagged(client, run_id, LATEST_TAG), tagged(client, run_id, BEST_TAG)) == (2, 2)


def test_a_file_that_was_damaged_while_it_waited_is_refused(
    client: MlflowClient, run_id: str, journal: Journal
) -> None:
    first, second = checkpoint(journal.directory, 1), checkpoint(journal.directory, 2)
    path = journal.directory / "checkpoint-000001.pth.tar"
    path.write_bytes(path.read_bytes()[:-1])
    put(journal, run_id, first, second)
    deliver_now(client, journal, TRACKING_KINDS)
    assert tagged(client, run_id, LATEST_TAG) == 2
    assert [manifest.iters for manifest in RunArtifacts(client, run_id).manifests()] == [2]
    refused = json.loads((journal.directory / REFUSED_NAME).read_text())
    assert "is corrupt" in refused["reason"]


def test_a_file_that_was_written_again_meanwhile_is_sent_once(
    client: MlflowClient, run_id: str, journal: Journal
) -> None:
    old = checkpoint(journal.directory, 1)
    state = {"state_dict": {"w": torch.zeros(9)}}
    new = Checkpoint.of(write_checkpoint(state, 1, directory=journal.directory).manifest)
    put(journal, run_id, old, new)
    deliver_now(client, journal, TRACKING_KINDS)
    [manifest] = RunArtifacts(client, run_id).manifests()
    assert manifest.sha256 == new.record["sha256"]
    assert not (journal.directory / REFUSED_NAME).exists()


# ---------------------------------------------------------------- the order and the once


def test_metrics_are_batched_and_each_point_is_kept_once(
    client: MlflowClient, run_id: str, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = MlflowClient.log_batch

    def counted(me: MlflowClient, run: str, metrics: Any = (), **rest: Any) -> Any:
        sizes.append(len(metrics))
        return original(me, run, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    put(journal, run_id, *(MetricPoints({"a": step, "b": -step}, step, step) for step in range(300)))
    put(journal, run_id, *(MetricPoints({"a": 7.0}, step, 9) for step in range(290, 310)))  # a resumed run repeats some
    deliver_now(client, journal, TRACKING_KINDS)
    assert sorted(steps(client, run_id, "a")) == list(range(310))
    assert sorted(steps(client, run_id, "b")) == list(range(300))
    assert len(sizes) == 1
    put(journal, run_id, MetricPoints({"a": 1.0}, 5, 1))
    Deliverer(client, journal, TRACKING_KINDS).send_some()  # another process: it reads what the run has
    assert len(steps(client, run_id, "a")) == 310


def test_many_repeated_points_are_kept_once(client: MlflowClient, run_id: str, journal: Journal) -> None:
    """A run died and was resumed while the server was unreachable: one request has both attempts' points."""
    put(journal, run_id, *(MetricPoints({"a": step}, step, 1) for step in range(200)))
    put(journal, run_id, *(MetricPoints({"a": step}, step, 2) for step in range(50, 250)))
    deliver_now(client, journal, TRACKING_KINDS)
    assert sorted(steps(client, run_id, "a")) == list(range(250))


def test_entries_that_mlflow_refuses_do_not_block_the_rest(
    client: MlflowClient, run_id: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    bad = MetricPoints({"no/such\nname": 1.0}, 1, 1)
    put(journal, run_id, MetricPoints({"a": 1.0}, 1, 1), bad, MetricPoints({"a": 2.0}, 2, 1))
    deliver_now(client, journal, TRACKING_KINDS)
    assert steps(client, run_id, "a") == [1, 2]
    assert json.loads((journal.directory / REFUSED_NAME).read_text())["body"]["values"] == {"no/such\nname": 1.0}
    assert journal.pending == 0


def test_a_deleted_run_keeps_its_entries(client: MlflowClient, run_id: str, journal: Journal) -> None:
    put(journal, run_id, MetricPoints({"a": 1.0}, 1, 1))
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match="was deleted; `mlflow runs restore --run-id"):
        deliver_now(client, journal, TRACKING_KINDS)
    client.restore_run(run_id)
    deliver_now(client, journal, TRACKING_KINDS)
    assert steps(client, run_id, "a") == [1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RestException({"error_code": "INTERNAL_ERROR", "message": "500"}), TrackingError),
        (MlflowException("API request failed with exception: too many 503 error responses"), TrackingError),
        (MlflowException("429 Too Many Requests"), TrackingError),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "bad"}), RefusedError),
    ],
)
def test_final_refusals(
    error: Exception, kind: type[TrackingError], client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_arguments: Any, **_keywords: Any) -> None:
        raise error

    monkeypatch.setattr(MlflowClient, "log_batch", answer)
    with pytest.raises(TrackingError) as caught:
        MetricPoints({"a": 1.0}, 1, 1).send(RunTarget(client, run_id, Path(), is_new=True))
    assert type(caught.value) is kind


# ---------------------------------------------------------------- the thread


def test_appending_never_waits_for_a_server_that_hangs(
    client: MlflowClient, run_id: str, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    original = MlflowClient.log_batch

    def hang(me: MlflowClient, *arguments: Any, **keywords: Any) -> Any:
        released.wait(20)
        return original(me, *arguments, **keywords)

    monkeypatch.setattr(MlflowClient, "log_batch", hang)
    reporter = Reporter()
    thread = Delivery(Deliverer(client, journal, TRACKING_KINDS, new_runs=[run_id]), reporter)
    for step in range(200):  # none of these returns before the first request has
        put(journal, run_id, MetricPoints({"a": 1.0}, step, 1))
        thread.wake()
    assert not released.is_set()
    assert journal.pending == 200
    released.set()
    assert thread.wait(StopFlag())
    thread.close()
    assert len(steps(client, run_id, "a")) == 200


def test_a_signal_ends_the_wait(
    client: MlflowClient, run_id: str, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_keywords: Any) -> Any:
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 1e9)  # nothing but the signal ends it
    put(journal, run_id, MetricPoints({"a": 1.0}, 1, 1))
    stop = StopFlag()
    stop.grace = 0.1
    thread = Delivery(Deliverer(client, journal, TRACKING_KINDS, new_runs=[run_id]), Reporter())
    threading.Timer(0.3, stop.set, [signal.SIGINT]).start()
    assert not thread.wait(stop)
    thread.close()
    assert journal.pending == 1


def test_a_bug_in_delivery_is_reported_and_loses_nothing(
    client: MlflowClient, run_id: str, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, fail = MlflowClient.log_batch, True

    def broken(me: MlflowClient, *arguments: Any, **keywords: Any) -> Any:
        if fail:
            raise ZeroDivisionError("a bug")
        return original(me, *arguments, **keywords)

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.02)
    reporter = Reporter()
    thread = Delivery(Deliverer(client, journal, TRACKING_KINDS, new_runs=[run_id]), reporter)
    put(journal, run_id, MetricPoints({"a": 1.0}, 1, 1))
    thread.wake()
    deadline = time.monotonic() + 10
    while not reporter.warnings and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "ZeroDivisionError: a bug; training goes on" in reporter.warnings[0]
    fail = False
    assert thread.wait(StopFlag())
    thread.close()


# ---------------------------------------------------------------- a server that is away at the start


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every call to the store fail while `.on` is set; the store counts as a server."""

    class Away:
        on = True

    monkeypatch.setattr(opening, "is_server", lambda _uri: True)
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 0.2)
    calls = [(MlflowClient, name) for name in dir(MlflowClient) if not name.startswith("_")]
    for owner, name in [*calls, (RunArtifacts, "_artifact_repository")]:
        original = getattr(owner, name)
        if not callable(original):
            continue

        def call(*arguments: Any, _original: Any = original, **keywords: Any) -> Any:
            if Away.on:
                raise ConnectionError("Connection refused")
            return _original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)
    return Away


def all_runs(client: MlflowClient) -> list[Any]:
    return list(client.search_runs([item.experiment_id for item in client.search_experiments()]))


def sync(directory: str = "models") -> Any:
    return run_sync(Path(directory), dry_run=False, tracking_uri=None, reporter=LoggingReporter(), stop=StopFlag())


class Death(BaseException):
    """An end for which nothing is saved, as with SIGKILL."""


def die_early(phase: str, done: int) -> None:
    """Die before there is a checkpoint."""
    if (phase, done) == ("training", 3):
        raise Death


@pytest.mark.parametrize(
    ("away_first", "elsewhere"), [(True, False), (False, False), (False, True)], ids=["offline", "online", "elsewhere"]
)
def test_a_run_that_starts_again_while_the_server_is_away_is_one_run(
    away_first: bool, elsewhere: bool, images: Path, client: MlflowClient, away: Any
) -> None:
    """It died before its first checkpoint; the same command, or its ID in another folder, is the same run."""
    away.on = away_first
    with pytest.raises(Death):
        run(images, "--save-dir", "models", "--run-name", "early", reporter=Reporter(die_early))
    if elsewhere:
        sync()
        [created] = all_runs(client)
        words = ["--save-dir", "elsewhere", "--resume", created.info.run_id]
        with pytest.MonkeyPatch.context() as patch:
            look = opening._find_unstarted_run
            patch.setattr(opening, "_find_unstarted_run", lambda *all_: (setattr(away, "on", True), look(*all_))[1])
            run(images, *words)
    else:
        away.on = True
        run(images, "--save-dir", "models", "--run-name", "early")
    away.on = False
    sync("elsewhere" if elsewhere else "models")
    [found] = all_runs(client)
    assert (found.info.run_name, found.info.status) == ("early", "FINISHED")
    assert steps(client, found.info.run_id, "train/loss") == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("is_away", [False, True])
def test_a_process_killed_while_it_creates_its_run(
    is_away: bool, images: Path, client: MlflowClient, away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow has created the run, and nobody has heard of its ID: the same command is the same run."""
    away.on = False

    def make_and_die(*arguments: Any, **options: Any) -> Any:
        make_run(*arguments, **options)
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(opening, "make_run", make_and_die)
        with pytest.raises(Death):
            run(images, "--save-dir", "models", "--run-name", "early")
    [created] = all_runs(client)
    lease._held.clear()  # as the end of the process would
    away.on = is_away
    run(images, "--save-dir", "models", "--run-name", "early")
    away.on = False
    sync()
    [found] = all_runs(client)
    assert (found.info.run_id, found.info.status) == (created.info.run_id, "FINISHED")
    assert steps(client, found.info.run_id, "train/loss") == [2, 4, 6, 8, 10, 12]


def test_another_configuration_in_the_same_folder_is_another_run(images: Path, client: MlflowClient, away: Any) -> None:
    with pytest.raises(Death):
        run(images, "--save-dir", "models", reporter=Reporter(die_early))
    run(images, "--save-dir", "models", "--lr", 0.01)
    away.on = False
    sync()
    assert len(all_runs(client)) == 2


def test_a_run_started_offline(images: Path, client: MlflowClient, away: Any, uninterrupted: Any) -> None:
    reporter = Reporter()
    summary = run(images, "--save-dir", "models", "--run-name", "offline", reporter=reporter)
    assert summary.run_id is None
    assert summary.pending == read_pending(Path("models")).entries[-1].seq
    assert any("training goes on" in text for text in reporter.warnings)
    assert read_checkpoint("models/bnps-checkpoint-000012.pth.tar")["run_id"] is None
    with pytest.raises(TrackingError, match="entries have not been sent and are kept in 'models/spool.jsonl'"):
        sync()
    away.on = False
    report = sync()
    assert (report.sent, report.pending) == (summary.pending, ())
    [created_run] = all_runs(client)
    info = created_run.info
    assert (info.run_id, info.run_name, info.status) == (report.run_id, "offline", "FINISHED")
    assert created_run.data.params["batch_size"] == "8"
    assert len(created_run.inputs.dataset_inputs) == 2
    repeated = run(images, "--save-dir", "models")  # the folder knows its run
    assert repeated.run_id == report.run_id
    assert_same_end(client, repeated, uninterrupted)
    assert sync().sent == 0


@only_in_full_run
@pytest.mark.long
def test_another_process_understands_the_whole_journal(
    images: Path, shufflenet: Invoke, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not imported the modules that wrote the journal, and must not set entries aside because of that."""
    monkeypatch.setattr("shufflenet_mlflow.tracking.delivery.GIVE_UP_SECONDS", 0.5)
    words = [*small_options(images), "--total-iters", 2, "--save-dir", "models", "--tracking-uri", "http://127.0.0.1:9"]
    words.remove("--no-log-models")
    assert shufflenet("train", *words).exit_code == 0
    store = client.tracking_uri
    command = [sys.executable, "-m", "shufflenet_mlflow", "sync", "models", "--tracking-uri", store, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "set aside" not in ran.stderr
    assert not Path("models/spool.refused.jsonl").exists()
    [made] = all_runs(client)
    assert "Not finished yet" not in made.data.tags["mlflow.note.content"]
    assert json.loads(ran.stdout)["pending"] == 0
    assert client.search_logged_models([made.info.experiment_id])


def test_the_server_returns_during_an_offline_run(
    images: Path, client: MlflowClient, away: Any, uninterrupted: Any
) -> None:
    def switch(phase: str, done: int) -> None:
        if phase == "training":
            away.on = done < 6
        if (phase, done) == ("training", 11):
            [folder] = Path("models").iterdir()
            deadline = time.monotonic() + 60
            while read_pending(folder).run_id is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    summary = run(images, reporter=Reporter(switch))
    assert summary.pending == 0
    assert_same_end(client, summary, uninterrupted)
    assert summary.save_dir.name.startswith("new-")
    assert read_checkpoint(summary.save_dir / "bnps-checkpoint-000012.pth.tar")["run_id"] == summary.run_id


def test_an_offline_run_resumes_offline(images: Path, client: MlflowClient, away: Any, uninterrupted: Any) -> None:
    from tests.support.training import run_until

    stopped = run_until(images, "training", 5, "--save-dir", "models")
    assert (stopped.run_id, stopped.result.iters) == (None, 5)
    ended = run(images, "--save-dir", "models")
    assert (ended.run_id, ended.result.iters) == (None, 12)
    away.on = False
    assert sync().pending == ()
    [created_run] = all_runs(client)
    assert created_run.info.status == "FINISHED"
    repeated = run(images, "--save-dir", "models")
    assert_same_end(client, repeated, uninterrupted)


def test_a_run_is_created_once_despite_interruptions(
    images: Path, client: MlflowClient, away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, "--save-dir", "models")
    away.on = False
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def die(*_arguments: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Journal, "bind", die)
        sync()
    sync()
    assert len(all_runs(client)) == 1


def test_an_answer_is_not_an_outage(images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "is_server", lambda _uri: True)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="the experiment 'gone' was deleted"):
        run(images, "--experiment", "gone")


def test_the_newest_checkpoint_may_be_local_only(
    images: Path, client: MlflowClient, away: Any, uninterrupted: Any
) -> None:
    """The server fails before the process stops: the run ID still finds the last checkpoint."""
    from tests.support.training import run_until

    def switch(phase: str, done: int) -> None:
        if phase == "training" and done == 6:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                if any('"iters": 5' in run.data.tags.get(LATEST_TAG, "") for run in all_runs(client)):
                    break
                time.sleep(0.02)
            away.on = True

    away.on = False
    stopped = run_until(images, "training", 8, on_progress=switch)
    assert stopped.pending
    away.on = False
    assert tagged(client, str(stopped.run_id), LATEST_TAG) == 5
    ended = run(images, "--resume", stopped.run_id)
    assert_same_end(client, ended, uninterrupted)
    assert client.get_run(str(ended.run_id)).data.tags["resumed.from_iters"] == "8"
    away.on = True
    assert run(images, "--resume", stopped.run_id).was_complete  # and without the server


# ---------------------------------------------------------------- the library call and the journal


def test_save_checkpoint_where_the_journal_cannot_be_read(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shufflenet_mlflow.tracking.journal_file.JOURNAL_VERSION", 2)
        Journal(Path("models")).close()
    with pytest.raises(
        TrackingError, match="has format 2, .*; the checkpoint checkpoint-000001.pth.tar is on the disk"
    ):
        save_checkpoint({"state_dict": {"w": torch.ones(3)}}, 1, run_id=run_id, directory="models")
    assert list_manifests(Path("models"))[0].iters == 1
    assert tagged(client, run_id, LATEST_TAG) is None


def test_sync_of_what_is_no_folder() -> None:
    with pytest.raises(JournalError, match="'nowhere' is not a folder; name the one that --save-dir named"):
        sync("nowhere")


def test_the_store_of_a_journal(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    assert stored_uri("http://me:secret@host:5000") == "http://host:5000"
    assert stored_uri("sqlite:///mlflow.db") == f"sqlite:///{workplace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert uri_of_journal("http://host:5000", None) == "http://me:secret@host:5000"
    with pytest.raises(
        TrackingError, match="http://other:5000, .* was not contacted; .*add --tracking-uri http://other"
    ):
        uri_of_journal("http://other:5000", None)
    remember_store("http://me:secret@other:5000")
    assert uri_of_journal("http://other:5000", None) == "http://other:5000"
    assert uri_of_journal("http://other:5000", "http://third") == "http://third"
    assert uri_of_journal(None, None) == "http://me:secret@host:5000"
