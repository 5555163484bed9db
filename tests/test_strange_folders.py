"""Folders and files from strangers: links lead nowhere, and neither sizes nor shared values take all memory."""

import json
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import CorruptCheckpointError, JournalError
from shufflenet_mlflow.tracking import exchanges
from shufflenet_mlflow.tracking.exchanges import ForeignAnswerError, refuse_foreign_answers
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from tests.support.command_line import Invoke

SECRET = "the user's own\n"


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("strangers")).info.run_id)


@pytest.fixture
def folder(run_id: str, client: MlflowClient, tmp_path: Path) -> Path:
    """A folder with a checkpoint, and a journal with an entry, a damaged line and one that is refused."""
    folder = tmp_path / "received"
    save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, 1, directory=folder)
    journal = Journal(folder)
    journal.set_owner(run_id, client.tracking_uri)
    journal.append(run_id, "tags", {"values": {"a": "b"}})
    journal.append(run_id, "tags", {"values": 7})
    journal.close()
    with open(folder / "spool.jsonl", "a") as file:
        file.write("touch /tmp/harm\n")
    return folder


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", ["spool.jsonl", "spool.lock", "spool.damaged.jsonl", "spool.refused.jsonl"])
@pytest.mark.parametrize("command", ["sync", "prune"])
def test_links_are_not_followed(
    command: str, name: str, exists: bool, folder: Path, tmp_path: Path, shufflenet: Invoke
) -> None:
    target = tmp_path / "precious"
    if exists:
        target.write_text(SECRET)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    words = {"sync": ["sync", folder], "prune": ["checkpoints", "prune", folder, "--keep-last", "1"]}[command]
    result = shufflenet(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if result.exit_code:
        assert "is a link" in result.stderr and len(result.stderr.splitlines()) <= 2, result.stderr
    assert (target.read_text() if exists else target.exists()) == (SECRET if exists else False)


@pytest.mark.parametrize("name", ["spool.jsonl", "checkpoint-000001.pth.tar.json"])
def test_files_of_absurd_size(name: str, folder: Path, shufflenet: Invoke) -> None:
    os.truncate(folder / name, 1 << 40)  # takes no room
    for words in (("sync", folder), ("checkpoints", "ls", folder)):
        result = shufflenet(*words)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output


def test_a_journal_of_rubbish(folder: Path) -> None:
    (folder / "spool.jsonl").write_bytes(b"\n" * 20_000)
    with pytest.raises(JournalError, match="is not a journal of this package: remove it"):
        read_pending(folder)


@pytest.mark.long
@pytest.mark.parametrize("key", ["config", "anything"])
def test_values_in_several_places(key: str, tmp_path: Path) -> None:
    """Ten to the power of nine values, in a few kilobytes."""
    values: list[Any] = ["x" * 100]
    for _ in range(9):
        values = [values] * 10
    torch.save({"state_dict": {"w": torch.zeros(3)}, key: {"a": values}}, tmp_path / "checkpoint-000001.pth.tar")
    with pytest.raises(CorruptCheckpointError, match="holds more than 5000000 values"):
        read_checkpoint(tmp_path / "checkpoint-000001.pth.tar")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("metrics", {"values": {"x": [1, 2]}, "step": 1, "timestamp": 1}),
        ("metrics", {"values": {"x": 1.0}, "step": 10**30, "timestamp": 1}),
        ("finish", {"status": "FINISHED", "end_time": 10**30, "iters": 1}),
    ],
)
def test_entries_that_no_store_takes_hold_up_nothing(
    kind: str, body: dict[str, Any], run_id: str, client: MlflowClient, tmp_path: Path, shufflenet: Invoke
) -> None:
    journal = Journal(tmp_path)
    journal.set_owner(run_id, client.tracking_uri)
    for number in (1, 2):
        journal.append(run_id, kind, body)
        journal.append(run_id, "metrics", {"values": {"y": 0.5}, "step": number, "timestamp": 1})
    journal.close()
    result = shufflenet("sync", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert (json.loads(result.stdout)["pending"], json.loads(result.stdout)["refused"]) == (0, 2)
    assert [point.step for point in client.get_metric_history(run_id, "y")] == [1, 2]


def test_a_checkpoint_that_no_store_takes(
    run_id: str, client: MlflowClient, tmp_path: Path, shufflenet: Invoke
) -> None:
    journal = Journal(tmp_path)
    journal.set_owner(run_id, client.tracking_uri)
    record = {"path": "checkpoints/checkpoint-000001.pth.tar", "iters": 10**30, "epoch": 1, "loss": 1.0}
    body = {"record": {**record, "val_top1": None, "sha256": "0" * 64, "bytes": 3}, "timestamp": 1}
    journal.append(run_id, "checkpoint", body)
    journal.close()
    result = shufflenet("sync", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["refused"] == 1


@pytest.fixture
def endless() -> Any:
    """Start a server whose answers never end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b" " * 65536)
            except OSError:
                pass

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_answer_without_end_is_given_up(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests.models.Response, "iter_content", requests.models.Response.iter_content)
    monkeypatch.setattr(exchanges, "LARGEST_ANSWER", 1 << 20)
    exchanges._bound_answers()
    began = time.monotonic()
    with pytest.raises(ForeignAnswerError):
        requests.get(endless, timeout=10)
    assert time.monotonic() - began < 30


def test_an_outage_between_two_requests_of_the_start(
    small_train: Callable[..., dict[str, Any]], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is created, and reading it fails: training starts, and it stays one run."""
    refuse_foreign_answers()
    read, failed = MlflowClient.get_run, []

    def get_run(self: MlflowClient, run_id: str) -> Any:
        if not failed:
            failed.append(run_id)
            raise ConnectionError("Connection refused")
        return read(self, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run)
    monkeypatch.setattr("shufflenet_mlflow.workflows.training.opening.is_server", lambda _uri: True)
    ended = small_train("--total-iters", 2)
    assert failed == [ended["run_id"]]
    [run] = client.search_runs([client.get_run(ended["run_id"]).info.experiment_id])
    assert run.info.status == "FINISHED"
