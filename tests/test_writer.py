"""One writer per run: the tag `writer`, who may take it, and what becomes of the process that has lost it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.errors import LostLeaseError, ResumeError, TrackingError
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import lease
from shufflenet_mlflow.tracking.abandoned import end_abandoned
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import FolderLease, read_pending
from shufflenet_mlflow.tracking.run import find_job
from shufflenet_mlflow.workflows.sync import run_sync
from tests.support.command_line import Invoke, small_options
from tests.support.metrics import steps
from tests.support.processes import Process, start
from tests.support.training import Reporter, run, run_until


def writer(client: MlflowClient, run_id: str | None) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(client.get_run(run_id).data.tags["writer"])
    return document


def pretend(client: MlflowClient, run_id: str | None, age: float = 5.0, **fields: object) -> None:
    """Let the run's tag name another writer, of the term that follows."""
    renewed = int((time.time() - age) * 1000)
    other = {"host": "elsewhere", "pid": 1, "started": renewed, "renewed": renewed, "token": "f" * 16, **fields}
    term = writer(client, run_id)["term"] + 1
    client.set_tag(run_id, "writer", json.dumps({"term": term, **other}))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.5)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.5)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 4.0)
    monkeypatch.setattr(lease, "LONGEST_WAIT", 6.0)


def test_a_run_names_its_writer_and_is_released(images: Path, client: MlflowClient) -> None:
    during: list[dict[str, Any]] = []

    def look(phase: str, done: int) -> None:
        if (phase, done) == ("training", 3):
            during.append(writer(client, client.search_runs(["1"])[0].info.run_id))

    stopped = run_until(images, "training", 6, "--save-dir", "models", on_progress=look)
    assert (during[0]["host"], during[0]["pid"]) == (socket.gethostname(), os.getpid())
    assert (during[0]["term"], during[0]["released"]) == (1, False)
    assert abs(during[0]["renewed"] / 1000 - time.time()) < 600
    assert writer(client, stopped.run_id)["released"]
    run(images, "--resume", stopped.run_id, "--save-dir", "elsewhere")
    assert (writer(client, stopped.run_id)["term"], writer(client, stopped.run_id)["released"]) == (2, True)


def test_a_fresh_writer_elsewhere_is_respected(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    pretend(client, stopped.run_id)
    before = dict(client.get_run(stopped.run_id).data.tags)
    message = rf"run {stopped.run_id} is being trained by process 1 on elsewhere, last seen \d+ s ago; .*--take-over"
    for source in (["--save-dir", "models"], ["--resume", stopped.run_id, "--save-dir", "other"]):
        with pytest.raises(ResumeError, match=message) as refused:
            run(images, *source)
        assert refused.value.code == "run-has-writer"
    assert client.get_run(stopped.run_id).data.tags == before
    taken = run(images, "--save-dir", "models", "--take-over")
    assert (taken.run_id, taken.result.iters) == (stopped.run_id, 12)
    assert writer(client, stopped.run_id)["term"] == 3


def test_of_this_machine_the_process_counts(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pretend(client, stopped.run_id, age=3600, host=socket.gethostname(), pid=alive.pid)
    with pytest.raises(ResumeError, match=f"is being trained by process {alive.pid} on"):
        run(images, "--save-dir", "models")
    alive.communicate()
    pretend(client, stopped.run_id, age=0, host=socket.gethostname(), pid=alive.pid)
    began = time.monotonic()
    assert run(images, "--save-dir", "models").run_id == stopped.run_id
    assert time.monotonic() - began < lease.WATCH_SECONDS


@pytest.mark.long
@pytest.mark.parametrize("age", [86400.0, -86400.0])
@pytest.mark.usefixtures("short")
def test_clocks_a_day_apart_are_watched(age: float, images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    pretend(client, stopped.run_id, age=age)
    looks = 0

    def renewed(_count: object = None) -> bool:
        nonlocal looks
        looks += 1
        time.sleep(0.3)
        pretend(client, stopped.run_id, age=age - looks)
        return True

    def read() -> lease.Writer | None:
        return lease.writer_in(client.get_run(stopped.run_id).data.tags)

    assert not lease.wait_until_free(read, is_patient=False, note=str, pause=renewed)[1]
    reporter = Reporter()
    assert run(images, "--save-dir", "models", reporter=reporter).run_id == stopped.run_id  # it has gone silent
    assert any("may still be at work: waiting" in note for note in reporter.notes)


@pytest.mark.long
@pytest.mark.usefixtures("short")
def test_an_automatic_restart_waits_for_the_lease_to_run_out(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--job", "pets")
    pretend(client, stopped.run_id, age=0)
    reporter = Reporter()
    assert run(images, "--job", "pets", reporter=reporter).run_id == stopped.run_id
    assert any("waiting for up to" in note for note in reporter.notes)


def lose(client: MlflowClient, images: Path, *options: object) -> str:
    """Train into `models` until, after the sixth iteration, another process takes the run; return the run's ID."""
    taken: list[str] = []

    def take(phase: str, done: int) -> None:
        if (phase, done) == ("training", 6):
            taken.append(client.search_runs(["1"])[0].info.run_id)
            deadline = time.monotonic() + 60
            while read_pending(Path("models")).entries and time.monotonic() < deadline:
                time.sleep(0.1)
            pretend(client, taken[0])
            time.sleep(lease.TRUST_SECONDS)

    with StopFlag() as stop, pytest.raises(LostLeaseError) as lost:
        run(images, "--save-dir", "models", *options, reporter=Reporter(take), stop=stop)
    text = str(lost.value)
    assert text.startswith(f"run {taken[0]} has been taken over by process 1 on elsewhere; nothing more is sent to it")
    assert "`shufflenet train --resume models --new-run --save-dir OTHER`" in text
    return taken[0]


def test_the_loser_sends_nothing_more_and_can_go_on_as_its_own_run(images: Path, client: MlflowClient) -> None:
    run_id = lose(client, images, "--save-interval", 100)
    found = client.get_run(run_id)
    assert found.info.status == "RUNNING"
    assert writer(client, run_id)["host"] == "elsewhere"
    assert max(steps(client, run_id, "train/loss")) <= 6
    latest = json.loads(found.data.tags["checkpoint.latest"])["iters"] if "checkpoint.latest" in found.data.tags else 0
    assert latest <= 6
    kept = read_pending(Path("models")).entries
    assert kept
    with pytest.raises(LostLeaseError, match="--new-run --save-dir OTHER"):
        run_sync(Path("models"), dry_run=False, tracking_uri=None, reporter=Reporter(), stop=StopFlag())
    assert {entry.seq for entry in kept} <= {entry.seq for entry in read_pending(Path("models")).entries}
    assert client.get_run(run_id).data.tags == found.data.tags
    fork = run(images, "--resume", "models", "--new-run", "--save-dir", "other", "--save-interval", 100)
    assert fork.run_id != run_id
    assert client.get_run(fork.run_id).info.status == "FINISHED"


def test_the_run_that_mlflow_run_created_fails_with_the_loss(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = run_until(images, "training", 5, "--save-dir", "first")
    wrapper = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    assert lose(client, images, "--resume", stopped.run_id) == stopped.run_id
    found = client.get_run(wrapper)
    assert (found.info.status, found.data.tags["continues.run"]) == ("FAILED", stopped.run_id)


def test_a_late_renewal_does_not_take_the_run_back(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    assert stopped.run_id is not None
    first, second = lease.Lease(), lease.Lease()
    read = lambda: lease.writer_in(client.get_run(stopped.run_id).data.tags)  # noqa: E731
    early = first.claim(read())["writer"]
    client.set_tag(stopped.run_id, "writer", early)
    client.set_tag(stopped.run_id, "writer", second.claim(read())["writer"])
    client.set_tag(stopped.run_id, "writer", early)  # on its way for a while
    second.require(client, stopped.run_id, fresh=True)
    with pytest.raises(LostLeaseError):
        first.renew(client, stopped.run_id)
    assert writer(client, stopped.run_id)["token"] == second.token


def test_a_late_sync_leaves_a_run_that_went_on_elsewhere_as_it_is(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    from shufflenet_mlflow.tracking.journal import Journal
    from shufflenet_mlflow.tracking.messages import Finish, Reopen, Tags, to_body
    from shufflenet_mlflow.tracking.note import Note

    journal = Journal(Path("models"))
    assert stopped.run_id is not None
    late = (Reopen({"resumed.from_iters": "6"}), Tags({"a": "old"}), Note.of("old"), Finish("KILLED", 1, 99))
    for message in late:
        journal.append(stopped.run_id, message.kind, to_body(message))
    journal.close()
    run(images, "--resume", stopped.run_id, "--save-dir", "elsewhere")
    before = client.get_run(stopped.run_id)
    with pytest.raises(LostLeaseError):
        run_sync(Path("models"), dry_run=False, tracking_uri=None, reporter=Reporter(), stop=StopFlag())
    after = client.get_run(stopped.run_id)
    assert after.info.status == before.info.status == "FINISHED"
    assert after.data.tags == before.data.tags
    kept = read_pending(Path("models")).entries
    assert [entry.kind for entry in kept[: len(late)]] == [message.kind for message in late]


def left_by_a_killed_process(directory: str, client: MlflowClient, run_id: str | None, lease: FolderLease) -> None:
    """Write the journal of a process that had begun to continue the run, and had two points for it."""
    journal = Journal(Path(directory))
    journal.set_owner(str(run_id), client.tracking_uri)
    journal.note_lease(lease)
    for step in (7, 8):
        journal.append(str(run_id), "metrics", {"values": {"late": 1.0}, "step": step, "timestamp": 1})
    journal.close()


@pytest.mark.parametrize("went_on_elsewhere", [False, True])
def test_a_folder_that_never_reached_its_run_yields_to_the_writer_after_it(
    went_on_elsewhere: bool, images: Path, client: MlflowClient
) -> None:
    """Even if that one has ended, and from the same iteration: it may have more to send."""
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    before = writer(client, stopped.run_id)["token"]
    left_by_a_killed_process("late", client, stopped.run_id, FolderLease("b" * 16, None, 8, taken=False, after=before))
    rest = {"dry_run": False, "tracking_uri": None, "reporter": Reporter(), "stop": StopFlag()}
    if not went_on_elsewhere:
        assert run_sync(Path("late"), **rest).sent == 2  # type: ignore[arg-type]
        assert steps(client, stopped.run_id, "late") == [7, 8]
        return
    run_until(images, "training", 8, "--resume", stopped.run_id, "--save-dir", "elsewhere")
    noted = read_pending(Path("elsewhere")).lease
    assert noted is not None
    assert noted.after == before
    tags = dict(client.get_run(stopped.run_id).data.tags)
    with pytest.raises(LostLeaseError, match="taken over by process"):
        run_sync(Path("late"), **rest)  # type: ignore[arg-type]
    assert dict(client.get_run(stopped.run_id).data.tags) == tags
    assert steps(client, stopped.run_id, "late") == []


def test_the_same_command_continues_the_folders_run_before_it_has_saved_there(
    images: Path, client: MlflowClient
) -> None:
    """A process that continued the run from elsewhere was killed before its first checkpoint."""
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    left_by_a_killed_process("other", client, stopped.run_id, FolderLease("b" * 16, None, 6))
    again = run(images, "--save-dir", "other")
    assert (again.run_id, again.result.iters) == (stopped.run_id, 12)
    assert len(client.search_runs(["1"])) == 1


def test_a_job_follows_its_fork_whatever_the_clock_said(images: Path, client: MlflowClient) -> None:
    experiment = client.create_experiment("jobs")
    ahead = int((time.time() + 86400) * 1000)
    parent = client.create_run(experiment, start_time=ahead, tags={"job": "pets"}).info.run_id
    fork = client.create_run(experiment, tags={"job": "pets", "resumed.from_run": parent}).info.run_id
    found = find_job(client, "pets", "jobs")
    assert found is not None
    assert found.run_id == fork


def mend(shufflenet: Invoke, *words: object) -> Any:
    result = shufflenet("runs", "mend", *words, "--json")
    return json.loads(result.stdout)


def test_a_run_whose_writer_is_gone_is_mended(images: Path, client: MlflowClient, shufflenet: Invoke) -> None:
    run_id = str(run_until(images, "training", 6, "--save-dir", "models").run_id)
    client.update_run(run_id, "RUNNING")
    gone = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    here = {"host": socket.gethostname(), "pid": gone.pid}
    pretend(client, run_id, age=0, **here)
    assert mend(shufflenet, run_id)["error"]["code"] == "run-still-trained"
    [row] = json.loads(shufflenet("runs", "--json").stdout)
    assert (row["status"], row["writer_state"]) == ("RUNNING", "alive")
    gone.communicate()
    [row] = json.loads(shufflenet("runs", "--json").stdout)
    assert (row["status"], row["writer_state"]) == ("RUNNING", "gone")
    shown = json.loads(shufflenet("runs", "show", run_id, "--json").stdout)
    assert (shown["status"], shown["writer_state"]) == ("RUNNING", "gone")
    assert "RUNNING (writer gone)" in shufflenet("runs", "--columns", "run_id,status").stdout
    assert "status      RUNNING (writer gone)" in shufflenet("runs", "show", run_id).stdout
    evaluated = shufflenet("eval", run_id)
    assert f"run {run_id} is RUNNING (writer gone): `shufflenet runs mend {run_id}` ends it" in evaluated.stderr
    tags = client.get_run(run_id).data.tags
    [mended] = mend(shufflenet, run_id[:8])
    assert (mended["before"], mended["status"]) == ("RUNNING", "KILLED")
    found = client.get_run(run_id)
    assert (found.info.status, found.data.tags) == ("KILLED", tags)
    assert found.info.end_time == writer(client, run_id)["renewed"]
    assert mend(shufflenet, run_id)[0]["before"] == "KILLED"
    assert json.loads(shufflenet("runs", "--json").stdout)[0]["writer_state"] is None
    reporter = Reporter()
    assert run(images, "--resume", run_id, "--save-dir", "there", reporter=reporter).run_id == run_id
    assert any("is gone without having ended it" in note for note in reporter.notes)


@pytest.mark.long
@pytest.mark.usefixtures("short")
def test_a_silent_writer_elsewhere_is_watched_before_its_run_is_mended(
    images: Path, client: MlflowClient, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [str(run_until(images, "training", 2, "--save-dir", name).run_id) for name in ("a", "b")]
    for run_id in ids:
        client.update_run(run_id, "RUNNING")
        pretend(client, run_id, age=3600)
    assert "RUNNING (writer silent)" in shufflenet("runs", "--columns", "run_id,status").stdout
    pretend(client, ids[1], age=1)
    assert mend(shufflenet, *ids)["error"]["code"] == "run-still-trained"
    assert client.get_run(ids[0]).info.status == "RUNNING", "none is changed unless all can be"
    client.delete_tag(ids[1], "writer")
    assert mend(shufflenet, ids[1])["error"]["code"] == "run-without-writer"
    assert mend(shufflenet, ids[0])[0]["status"] == "KILLED"
    client.update_run(ids[0], "RUNNING")
    before = lease.writer_in(client.get_run(ids[0]).data.tags)
    assert before is not None
    pretend(client, ids[0], age=0)
    with pytest.raises(TrackingError) as refused:
        end_abandoned(client, ids[0], before)
    assert refused.value.code == "run-resumed-meanwhile"

    set_terminated = MlflowClient.set_terminated

    def resumed_at_once(self: MlflowClient, run_id: str, *words: Any) -> None:
        set_terminated(self, run_id, *words)
        pretend(client, run_id, age=0)

    current = lease.writer_in(client.get_run(ids[0]).data.tags)
    assert current is not None
    monkeypatch.setattr(MlflowClient, "set_terminated", resumed_at_once)
    with pytest.raises(TrackingError) as refused:
        end_abandoned(client, ids[0], current)
    assert refused.value.code == "run-resumed-meanwhile"
    assert client.get_run(ids[0]).info.status == "RUNNING"


def test_nothing_is_begun_by_a_process_that_was_suspended_between_two_requests(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is a file, its manifest, and a tag: here the run is taken over while the file is on its way."""
    monkeypatch.setattr(lease, "TRUST_SECONDS", 0.2)
    upload = RunArtifacts.upload

    def suspended(self: RunArtifacts, path: Path, manifest: Any) -> None:
        upload(self, path, manifest)
        pretend(client, self.run_id)
        time.sleep(0.5)

    monkeypatch.setattr(RunArtifacts, "upload", suspended)
    with StopFlag() as stop, pytest.raises(LostLeaseError):
        run(images, "--save-dir", "models", stop=stop)
    [found] = client.search_runs(["1"])
    assert [item.path for item in client.list_artifacts(found.info.run_id, "checkpoints")] == [
        "checkpoints/checkpoint-000004.pth.tar"
    ]
    assert "checkpoint.latest" not in found.data.tags


def train(folder: Path, images: Path, uri: str, *words: object) -> Process:
    options = ["--total-iters", 60, "--save-interval", 5, "--val-interval", 100, "--json"]
    return start(folder, "train", *small_options(images), *options, *words, env={"MLFLOW_TRACKING_URI": uri})


@pytest.mark.long
@pytest.mark.timeout(600)
def test_of_two_that_begin_at_once_one_writes(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    options = ["--total-iters", 60, "--save-interval", 5, "--val-interval", 100]
    stopped = run_until(images, "training", 6, "--save-dir", tmp_path / "first", *options)
    both = [train(tmp_path / name, images, uri, "--resume", stopped.run_id) for name in "ab"]
    outcomes = [(*process.communicate(), process.returncode) for process in both]
    assert sorted(status for _, _, status in outcomes) == [0, 1], outcomes
    [loser] = [err for _, err, status in outcomes if status == 1]
    assert "is being trained by" in loser or "has been taken over by" in loser
    points = client.get_metric_history(stopped.run_id, "train/loss")
    assert len({point.step for point in points}) == len(points) == 30
    assert client.get_run(stopped.run_id).info.status == "FINISHED"
