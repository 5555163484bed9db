"""Processes that lose their run to another one: suspended, cut off, killed, several at once, under `mlflow run`."""

import json
import os
import re
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.errors import LostLeaseError
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import delivery, lease
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.workflows.sync import run_sync
from tests.support.command_line import small_options
from tests.support.mlflow_server import Server
from tests.support.processes import Process, kill, start, torchrun, wait_for_iteration, worker
from tests.support.proxy import Proxy
from tests.support.training import Reporter, run, run_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def train(folder: Path, images: Path, uri: str, *words: object, under: tuple[str, ...] = ()) -> Process:
    options = ["--total-iters", 60, "--save-interval", 10, "--val-interval", 1000, "--display-interval", 1, "--json"]
    env = {"MLFLOW_TRACKING_URI": uri}
    return start(folder, "train", *small_options(images), *options, *words, env=env, under=under)


def named(client: MlflowClient, name: str) -> str:
    """Return the ID of the run of that name."""
    [found] = client.search_runs(["0", "1"], f"attributes.run_name = '{name}'")
    return str(found.info.run_id)


def snapshot(client: MlflowClient, run_id: str) -> tuple[Any, ...]:
    """Return everything that a writer could have changed."""
    found = client.get_run(run_id)
    points = {name: client.get_metric_history(run_id, name) for name in found.data.metrics}
    stored = sorted((item.path, item.file_size) for item in client.list_artifacts(run_id, "checkpoints"))
    counts = {name: [(point.step, point.value) for point in found] for name, found in points.items()}
    return found.info.status, found.info.end_time, found.data.tags, counts, stored


def assert_one_request_late(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Check that nothing has changed but by the one request during which the earlier writer was suspended."""
    (*run, tags, counts, stored), (*run_then, tags_then, counts_then, stored_then) = after, before
    assert run == run_then
    files = set(stored) - set(stored_then)
    assert len(files) <= 1, files
    assert set(stored_then) <= set(stored)
    late = {name: Counter(points) - Counter(counts_then.get(name, [])) for name, points in counts.items()}
    steps = sorted(step for points in late.values() for step, _value in points)
    assert not (files and steps), (files, steps)
    assert all(not Counter(points) - Counter(counts[name]) for name, points in counts_then.items())
    assert all(step < 60 for step in steps), "the new writer had come further"
    assert tags == tags_then or steps, "tags arrive with points"


def assert_lost(err: str, run_id: str) -> list[str]:
    """Check the loser's only error, and return the words of the command that it prints."""
    errors = [line for line in err.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, err
    assert "shufflenet_mlflow/" not in err, "a traceback, other than torchrun's own"
    assert errors[0].startswith(f"Error: run {run_id} has been taken over by process ")
    printed = re.search(r"`shufflenet (train [^`]*)`", errors[0])
    assert printed is not None
    return shlex.split(printed[1])


def test_a_process_that_was_suspended_past_its_lease(server: Server, images: Path, tmp_path: Path) -> None:
    client = MlflowClient(server.uri)
    slow = train(
        *(tmp_path / "slow", images, server.uri, "--run-name", "suspended", "--total-iters", 4000),
        *("--save-dir", "models"),
    )
    try:
        wait_for_iteration(slow, 20)
        run_id = named(client, "suspended")
        slow.send_signal(signal.SIGSTOP)
        refused = train(tmp_path / "b", images, server.uri, "--resume", run_id, "--total-iters", 4000)
        _, err = refused.communicate()
        assert refused.returncode == 1, err
        assert f"Error: run {run_id} is being trained by process {slow.pid}" in err
        taker = train(tmp_path / "c", images, server.uri, "--resume", run_id, "--total-iters", 4000, "--take-over")
        wait_for_iteration(taker, 60)
        taker.send_signal(signal.SIGTERM)
        taker.communicate()
        before = snapshot(client, run_id)
        assert before[0] == "KILLED"
        slow.send_signal(signal.SIGCONT)
        _, err = slow.communicate()
    finally:
        if slow.poll() is None:
            slow.send_signal(signal.SIGCONT)
            kill(slow)
    assert slow.returncode == 1, err
    words = assert_lost(err, run_id)
    after = snapshot(client, run_id)
    assert_one_request_late(before, after)
    assert list((tmp_path / "slow/models").glob("*checkpoint-*.pth.tar"))
    assert read_pending(tmp_path / "slow/models").entries
    fork = start(tmp_path / "slow", *words, env={"MLFLOW_TRACKING_URI": server.uri})
    wait_for_iteration(fork, 1)
    fork.send_signal(signal.SIGTERM)
    fork.communicate()
    assert fork.returncode == 128 + signal.SIGTERM
    [forked] = client.search_runs(["0", "1"], f"tags.`resumed.from_run` = '{run_id}'")
    assert forked.info.status == "KILLED"
    assert snapshot(client, run_id) == after


def test_a_trainer_that_was_killed_is_resumed_at_once(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    first = train(tmp_path / "first", images, uri, "--run-name", "killed", "--total-iters", 4000)
    wait_for_iteration(first, 25)
    kill(first)
    run_id = named(client, "killed")
    assert writer_of(client, run_id)["pid"] == first.pid
    second = start(tmp_path / "second", "train", "--resume", run_id, env={"MLFLOW_TRACKING_URI": uri})
    wait_for_iteration(second, 11)
    second.send_signal(signal.SIGTERM)
    _, err = second.communicate()
    assert second.returncode == 128 + signal.SIGTERM, err
    assert (writer_of(client, run_id)["term"], client.get_run(run_id).info.status) == (2, "KILLED")


def test_two_processes_whose_run_is_taken_over(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    words = ["--run-name", "two", "--total-iters", 4000, "--save-dir", "m"]
    both = train(tmp_path / "two", images, uri, *words, under=torchrun(2))
    wait_for_iteration(both, 10)
    run_id = named(client, "two")
    workers = [worker(both, rank) for rank in (0, 1)]
    other = {"host": "elsewhere", "pid": 1, "started": 1, "renewed": 1, "term": 2, "token": "f"}
    client.set_tag(run_id, "writer", json.dumps(other))
    out, err = both.communicate()
    assert both.returncode == 1, err
    assert not any(process.is_running() for process in workers)
    assert_lost(err, run_id)
    assert json.loads(out)["error"]["code"] == "run-taken-over"
    assert writer_of(client, run_id)["host"] == "elsewhere"
    assert client.get_run(run_id).info.status == "RUNNING"


def writer_of(client: MlflowClient, run_id: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(client.get_run(run_id).data.tags["writer"])
    return document


def cut_off_at(proxy: Proxy, iteration: int, *, back_at: int | None, act: Callable[[], object]) -> Reporter:
    """Return a reporter that cuts the trainer off from the server, acts, and connects it again."""

    def change(phase: str, done: int) -> None:
        if (phase, done) == ("training", iteration):
            deadline = time.monotonic() + 60
            while read_pending(Path("models")).entries and time.monotonic() < deadline:
                time.sleep(0.1)
            proxy.mode = "html-503"
            act()
        if (phase, done) == ("training", back_at):
            proxy.mode = "pass"

    return Reporter(change)


@pytest.mark.parametrize("back_at", [9, None])
def test_a_loser_that_was_cut_off(
    back_at: int | None, server: Server, proxy: Proxy, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears of its loss late, or only from `sync`."""
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 60.0 if back_at else 2.0)
    monkeypatch.setattr(lease, "TRUST_SECONDS", 0.0)  # the outage is shorter
    client, name = MlflowClient(server.uri), f"cut off {back_at}"
    taken: list[tuple[Any, ...]] = []

    def take() -> None:
        run_id = named(client, name)
        other = {"host": "elsewhere", "pid": 1, "started": 1, "renewed": 1, "term": 2, "token": "f"}
        client.set_tag(run_id, "writer", json.dumps(other))
        taken.append(snapshot(client, run_id))

    words = ["--save-dir", "models", "--tracking-uri", proxy.uri, "--run-name", name]
    reporter = cut_off_at(proxy, 6, back_at=back_at, act=take)
    with StopFlag() as stop:
        if back_at:
            with pytest.raises(LostLeaseError):
                run(images, *words, reporter=reporter, stop=stop)
        else:
            assert run(images, *words, reporter=reporter, stop=stop).pending > 0
            proxy.mode = "pass"
    run_id = named(client, name)
    kept = {entry.seq for entry in read_pending(Path("models")).entries}
    assert kept
    with pytest.raises(LostLeaseError, match="--resume models --new-run"):
        run_sync(Path("models"), dry_run=False, tracking_uri=proxy.uri, reporter=Reporter(), stop=StopFlag())
    assert kept <= {entry.seq for entry in read_pending(Path("models")).entries}
    assert snapshot(client, run_id) == taken[0]


def test_a_run_resumed_without_its_server_takes_its_turn_at_first_contact(
    server: Server, proxy: Proxy, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 60.0)
    client = MlflowClient(server.uri)
    words = ["--save-dir", "models", "--tracking-uri", proxy.uri, "--run-name", "offline"]
    stopped = run_until(images, "training", 6, *words)
    run_id = named(client, "offline")
    proxy.mode = "html-503"
    seen: list[dict[str, Any]] = []

    def connect(phase: str, done: int) -> None:
        if (phase, done) == ("training", 9):
            seen.append(writer_of(client, run_id))
            proxy.mode = "pass"

    ended = run(images, *words, reporter=Reporter(connect))
    assert (ended.run_id, ended.result.iters, ended.pending) == (stopped.run_id, 12, 0)
    assert (seen[0]["term"], seen[0]["released"]) == (1, True)
    assert (writer_of(client, run_id)["term"], writer_of(client, run_id)["released"]) == (2, True)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_signal_while_two_processes_wait_for_a_writer(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    stopped = run_until(images, "training", 6, "--job", "waiting", "--save-dir", tmp_path / "first")
    now = int(time.time() * 1000)
    other = {"host": "elsewhere", "pid": 1, "started": now, "renewed": now, "term": 2, "token": "f"}
    client.set_tag(str(stopped.run_id), "writer", json.dumps(other))
    both = train(tmp_path / "both", images, uri, "--job", "waiting", "--total-iters", 12, under=torchrun(2))
    assert both.stderr is not None
    assert any("waiting for up to" in line for line in both.stderr)
    leader = worker(both, 0)
    leader.send_signal(signal.SIGTERM)
    _, err = both.communicate()
    assert not [line for line in err.splitlines() if line.startswith("Error")], err
    assert re.search(r"exitcode\s*:\s*143", err), err
    assert client.get_run(str(stopped.run_id)).info.status == "KILLED"
