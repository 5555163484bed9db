"""`durable+http://…`: what any MLflow client logs goes through a journal; see also `test_long_durable.py`."""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.tracking._tracking_service.utils import _tracking_store_registry

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.tracking import durable, durable_runs, durable_store
from shufflenet_mlflow.tracking.durable_artifacts import DurableArtifacts
from shufflenet_mlflow.tracking.durable_errors import NoAnswerError
from shufflenet_mlflow.tracking.durable_runs import FOLDER_VARIABLE, RunJournal, folder_of
from shufflenet_mlflow.tracking.durable_store import DurableStore
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
from shufflenet_mlflow.tracking.logged import LoggedBatch, LoggedFile
from shufflenet_mlflow.tracking.refused import read_refused
from shufflenet_mlflow.tracking.uris import server_behind, uri_in_force
from tests.support import durable as durable_scripts
from tests.support.command_line import Invoke
from tests.support.delivering import deliver_now
from tests.support.network import free_port
from tests.support.small_server import small_server
from tests.test_imports import imported


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[DurableStore]:
    """Return the store of a server that is away."""
    monkeypatch.setattr(durable_store, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(durable_runs, "END_SECONDS", 0.1)
    yield DurableStore(f"http://127.0.0.1:{free_port()}")
    durable_runs.finish_all()


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run("0").info.run_id)


def deliver(client: MlflowClient, run_id: str) -> None:
    """Send what the run's journal holds to another store than it was meant for."""
    durable_runs.finish_all()
    with closing(Journal(folder_of(run_id))) as journal:
        deliver_now(client, journal, TRACKING_KINDS)


def test_what_is_logged_while_the_server_is_away(dead: DurableStore, run_id: str, client: MlflowClient) -> None:
    dead.log_metric(run_id, Metric("loss", 0.5, 1000, 3))
    dead.log_metric(run_id, Metric("loss", math.nan, 1001, 3))
    dead.log_metric(run_id, Metric("loss", 0.25, 1002, 3))
    dead.log_batch(run_id, [Metric("f1", math.inf, 1000, 0)], [Param("lr", "0.1")], [RunTag("who", "me")])
    dead.log_param_async(run_id, Param("wd", "0")).wait()
    dead.log_metric_async(run_id, Metric("f1", 1.0, 1000, 1)).wait()
    dead.set_tag_async(run_id, RunTag("who", "you")).wait()
    dead.log_inputs(run_id, [], [])
    info = dead.update_run_info(run_id, 3, 5000, "renamed")
    assert (info.status, info.end_time, info.run_name) == ("FINISHED", 5000, "renamed")
    deliver(client, run_id)
    run = client.get_run(run_id)
    loss = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.timestamp) for point in loss] == [(3, 1000), (3, 1001), (3, 1002)]
    assert [point.value for point in client.get_metric_history(run_id, "f1")] == [1.7976931348623157e308, 1.0]
    assert run.data.params == {"lr": "0.1", "wd": "0"} and run.data.tags["who"] == "you"
    assert (run.info.status, run.info.end_time, run.info.run_name) == ("FINISHED", 5000, "renamed")


def test_numbers_of_numpy_and_torch(dead: DurableStore, run_id: str, client: MlflowClient) -> None:
    dead.log_metric(run_id, Metric("loss", np.float32(0.5), np.int64(1000), np.int32(3)))
    dead.log_metric(run_id, Metric("loss", 0.25, 1000, torch.tensor(4)))
    dead.update_run_info(run_id, 3, np.int64(5000), None)
    deliver(client, run_id)
    assert [(point.value, point.step) for point in client.get_metric_history(run_id, "loss")] == [(0.5, 3), (0.25, 4)]
    assert client.get_run(run_id).info.end_time == 5000


@pytest.mark.parametrize("step", [1.5, math.nan, True, None, "3", 1 << 63, np.arange(2), torch.arange(2)])
def test_a_step_that_is_none_harms_nothing_else(
    step: Any, dead: DurableStore, run_id: str, client: MlflowClient
) -> None:
    dead.log_metric(run_id, Metric("loss", 0.5, 1000, 1))
    point = Metric("loss", 0.5, 1000, 0)
    point._step = step
    with pytest.raises(MlflowException, match=r"step of metric 'loss' \(=|a value for step"):
        dead.log_metric(run_id, point)
    with pytest.raises(MlflowException, match="this cannot be logged: .* surrogates not allowed"):
        dead.set_tag(run_id, RunTag("half", "\ud800"))
    dead.log_metric(run_id, Metric("loss", 0.5, 1000, 2))
    deliver(client, run_id)
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1, 2]


def test_an_entry_that_cannot_be_written_does_not_count(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        with pytest.raises(TypeError):
            journal.append("0" * 32, "batch", {"step": np.int64(1)})
        journal.append("0" * 32, "batch", {"step": 1})
        assert journal.pending == 1
    assert [entry.body for entry in read_pending(tmp_path).entries] == [{"step": 1}]


def test_a_file_that_another_one_is_in_the_way_of(
    dead: DurableStore, run_id: str, client: MlflowClient, tmp_path: Path
) -> None:
    """It is set aside, and what was logged after it arrives."""
    artifacts = DurableArtifacts(f"mlflow-artifacts:/0/{run_id}/artifacts", dead.uri)
    for name in ("notes", "text"):
        tmp_path.joinpath(name).write_text(name)
    artifacts.log_artifact(str(tmp_path / "notes"))
    artifacts.log_artifact(str(tmp_path / "text"), "notes")
    for name in ("a\nb", "a#b.txt", "a?b.txt", "a%41.txt"):
        tmp_path.joinpath(name).write_text("")
        with pytest.raises(MlflowException, match=f"MLflow cannot keep an artifact called {re.escape(repr(name))}"):
            artifacts.log_artifact(str(tmp_path / name))
    for name in ("50 % of all.txt", "ä b'\"&+;=@.txt", "a%zz.txt"):
        tmp_path.joinpath(name).write_text("kept")
        artifacts.log_artifact(str(tmp_path / name))
    dead.log_metric(run_id, Metric("loss", 0.5, 1000, 1))
    deliver(client, run_id)
    assert len(client.get_metric_history(run_id, "loss")) == 1
    assert [entry["kind"] for entry in read_refused(folder_of(run_id))] == ["file"]
    stored = {item.path for item in client.list_artifacts(run_id)}
    assert stored == {"notes", "50 % of all.txt", "ä b'\"&+;=@.txt", "a%zz.txt"}


def test_what_is_sent_twice_is_there_once(dead: DurableStore, run_id: str, client: MlflowClient) -> None:
    """A process is killed when its entries have arrived, and before it notes that."""
    for step in range(5):
        dead.log_metric(run_id, Metric("loss", step / 3, 1000, step))
    dead.log_param(run_id, Param("lr", "0.1"))
    durable_runs.finish_all()
    path = folder_of(run_id) / "spool.jsonl"
    before = path.read_bytes()
    deliver(client, run_id)
    path.write_bytes(before)
    dead.log_metric(run_id, Metric("loss", math.nan, 1000, 9))
    deliver(client, run_id)
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [0, 1, 2, 3, 4, 9]


def test_files_wait_in_the_journal(dead: DurableStore, run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    source = tmp_path / "notes ü (1) 50 %.txt"
    uri = f"mlflow-artifacts:/0/{run_id}/artifacts"
    artifacts = DurableArtifacts(uri, dead.uri)
    source.write_text("first")
    artifacts.log_artifact(str(source))
    source.write_text("second")
    artifacts.log_artifact(str(source), "deep/er")
    DurableArtifacts(f"{uri}/deep", dead.uri).log_artifact(str(source), "down")
    source.unlink()
    with pytest.raises(FileNotFoundError):
        artifacts.log_artifact(str(source))
    with pytest.raises(MlflowException, match="Invalid artifact path"):
        artifacts.log_artifact(__file__, "../elsewhere")
    deliver(client, run_id)
    arrived = Path(client.get_run(run_id).info.artifact_uri)
    files = {str(path.parent.relative_to(arrived)): path.read_text() for path in arrived.rglob(source.name)}
    assert files == {".": "first", "deep/er": "second", "deep/down": "second"}
    assert not list((folder_of(run_id) / "files").iterdir())


@pytest.mark.parametrize("of_folder", [True, False])
def test_a_link_among_the_files(
    of_folder: bool, dead: DurableStore, run_id: str, client: MlflowClient, tmp_path: Path
) -> None:
    """A folder from a stranger must not make `sync` upload any other file."""
    (tmp_path / "notes.txt").write_text("public")
    (tmp_path / "secret").write_text("secret")
    DurableArtifacts(f"mlflow-artifacts:/0/{run_id}/artifacts", dead.uri).log_artifact(str(tmp_path / "notes.txt"))
    (copy,) = folder_of(run_id).rglob("notes.txt")
    copy.unlink()
    if of_folder:
        copy.parent.rmdir()
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets" / "notes.txt").write_text("secret")
        copy.parent.symlink_to(tmp_path / "secrets")
    else:
        copy.symlink_to(tmp_path / "secret")
    deliver(client, run_id)
    says = "is not a file of the journal" if of_folder else "cannot be read"
    assert says in read_refused(folder_of(run_id))[0]["reason"]
    assert not list(Path(client.get_run(run_id).info.artifact_uri).rglob("notes.txt"))


@pytest.mark.parametrize(
    ("metrics", "params", "tags"),
    [
        ([Metric("bad!name", 1.0, 1, 1)], [], []),
        ([Metric("loss", "high", 1, 1)], [], []),  # type: ignore[arg-type]
        ([], [Param("lr", "0.2")], []),
        ([], [Param("a", "1"), Param("a", "2")], []),
        ([], [Param("x" * 251, "1")], []),
        ([], [], [RunTag("../up", "1")]),
        ([Metric("loss", 1.0, 1, 1)] * 1001, [], []),
    ],
)
def test_what_mlflow_would_refuse_is_refused_at_once(
    metrics: list[Metric], params: list[Param], tags: list[RunTag], dead: DurableStore, run_id: str
) -> None:
    dead.log_param(run_id, Param("lr", "0.1"))
    with pytest.raises(MlflowException) as raised:
        dead.log_batch(run_id, metrics, params, tags)
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"
    assert len(read_pending(folder_of(run_id)).entries) == 1


@pytest.mark.parametrize(
    ("status", "body", "code", "says"),
    [
        (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}', "RESOURCE_DOES_NOT_EXIST", "no run"),
        (401, "You are not authenticated.", "UNAUTHENTICATED", "not authenticated"),
    ],
)
def test_a_run_that_the_server_refuses(status: int, body: str, code: str, says: str) -> None:
    with small_server(status, body) as address:
        store = DurableStore(f"http://{address}")
        for _ in range(2):
            with pytest.raises(MlflowException, match=says) as raised:
                store.log_metric("0" * 32, Metric("loss", 1.0, 1, 1))
            assert raised.value.error_code == code
    assert not folder_of("0" * 32).exists()


def test_another_value_of_a_parameter_logged_elsewhere(
    dead: DurableStore, run_id: str, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    """That cannot be known; the rest of what waits arrives all the same."""
    client.log_param(run_id, "lr", "0.1")
    dead.log_param(run_id, Param("wd", "0"))
    dead.log_param(run_id, Param("lr", "0.2"))
    dead.log_metric(run_id, Metric("loss", 1.0, 1, 1))
    deliver(client, run_id)
    run = client.get_run(run_id)
    assert run.data.params == {"lr": "0.1", "wd": "0"} and run.data.metrics == {"loss": 1.0}
    assert [entry["body"]["params"] for entry in read_refused(folder_of(run_id))] == [{"lr": "0.2"}]
    assert sum("set aside" in record.message for record in caplog.records) == 1


def test_contradictions_in_one_journal(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    """Two processes of one run; the first value stays, as MLflow would have it."""
    with closing(Journal(tmp_path)) as journal:
        journal.set_owner(run_id, client.tracking_uri)
        for value in ("1", "2"):
            body = {"metrics": [], "params": {"a": value}, "tags": {}}
            journal.append(run_id, LoggedBatch.kind, body)
        deliver_now(client, journal, TRACKING_KINDS)
    assert client.get_run(run_id).data.params == {"a": "1"}
    assert len(read_refused(tmp_path)) == 1


def test_what_needs_the_server_says_so(dead: DurableStore, run_id: str) -> None:
    for ask in (
        lambda: dead.create_run("0", "me", 1, [], "name"),
        lambda: dead.get_run(run_id),
        lambda: dead.get_metric_history(run_id, "loss"),
        lambda: dead.search_runs(["0"], "", 1),
    ):
        with pytest.raises(NoAnswerError, match=rf"at {dead.uri}: connection refused") as raised:
            ask()
        assert "\n" not in str(raised.value)


def test_a_known_run_is_read_from_memory(
    dead: DurableStore, run_id: str, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    dead._known[run_id] = client.get_run(run_id)
    for _ in range(2):
        assert dead.get_run(run_id).info.status == "RUNNING"
    assert [record.message for record in caplog.records] == [
        f"cannot read a run at {dead.uri}: connection refused; run {run_id} is taken to be as it was last read"
    ]
    dead.update_run_info(run_id, 4, 7, None)
    info = dead.get_run(run_id).info
    assert (info.status, info.end_time, info.artifact_uri) == ("FAILED", 7, client.get_run(run_id).info.artifact_uri)


def test_each_process_has_a_folder(dead: DurableStore, run_id: str, client: MlflowClient) -> None:
    other = RunJournal(dead.uri, run_id, folder_of(run_id))  # as another process would hold it
    dead.log_metric(run_id, Metric("loss", 1.0, 1, 1))
    other.record(LoggedBatch.of([Metric("loss", 2.0, 1, 2)], {}, {}))
    other.close()
    durable_runs.finish_all()
    assert len(read_pending(folder_of(run_id)).entries) == 1
    assert len(read_pending(folder_of(run_id) / "process-2").entries) == 1
    again = DurableStore(dead.uri)
    again.log_metric(run_id, Metric("loss", 3.0, 1, 3))
    assert [journal.journal.pending for journal in durable_runs._open[dead.uri, run_id]] == [2, 1]
    summary = CliRunner().invoke(main, ["sync", "mlflow-journal", "--dry-run"])
    assert f"3 entries are pending for 1 run in {dead.uri}: 3 calls that log" in summary.output


def test_a_folder_that_cannot_be(dead: DurableStore, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, "file")
    with pytest.raises(MlflowException, match=rf"cannot keep a journal in .*{FOLDER_VARIABLE} names another folder"):
        dead.log_metric(run_id, Metric("loss", 1.0, 1, 1))


def test_a_lock_whose_file_its_holder_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two processes would each hold one, of a file that is gone and of one that is there."""
    path, lock = tmp_path / "lock", fcntl.lockf
    removals = iter((path.unlink, lambda: path.write_text("another's")))

    def lockf(*arguments: Any) -> None:
        next(removals, lambda: None)()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    held = FileLock(path, "the folder")
    assert os.path.samestat(path.stat(), os.fstat(held._descriptor))
    assert path.read_text() == str(os.getpid())
    held.release()


def test_a_file_that_is_copied_while_its_run_ends(
    dead: DurableStore, run_id: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The journal is closed meanwhile, by another thread; the file goes into the next one."""
    source = tmp_path / "notes.txt"
    source.write_text("notes")
    copy, ends = LoggedFile.copy_of, iter((lambda: durable_runs.let_go(dead.uri, run_id),))

    def copy_of(*arguments: Any) -> LoggedFile:
        message = copy(*arguments)
        next(ends, lambda: None)()
        return message

    monkeypatch.setattr(LoggedFile, "copy_of", copy_of)
    durable_runs.record_file(dead.uri, run_id, source, "")
    assert [entry.kind for entry in read_pending(folder_of(run_id)).entries] == ["file"]
    assert [path.read_text() for path in folder_of(run_id).rglob("notes.txt")] == ["notes"]


def test_a_journal_that_is_empty_leaves_nothing(dead: DurableStore, run_id: str) -> None:
    journal = RunJournal(dead.uri, run_id, folder_of(run_id))
    second = RunJournal(dead.uri, run_id, folder_of(run_id) / "process-2")
    journal.close()
    assert folder_of(run_id).is_dir()
    second.close()
    assert not folder_of(run_id).parent.exists()


def test_entry_points() -> None:
    for names in durable_scripts.entry_points().values():
        for reference in names.values():
            module, _, function = reference.partition(":")
            assert callable(getattr(import_module(module), function))
    assert set(durable_scripts.entry_points()["mlflow.tracking_store"]) == set(durable.DURABLE_SCHEMES)


def test_loading_the_entry_points_imports_little(tmp_path: Path) -> None:
    """Whoever imports MLflow loads them, in every environment that has this package."""
    assert imported("import shufflenet_mlflow.tracking.durable", tmp_path) == set()


def test_plain_servers_are_left_alone() -> None:
    found = durable.open_artifacts("mlflow-artifacts:/0/x/artifacts", "http://127.0.0.1:1")
    assert type(found) is MlflowArtifactsRepository
    found = durable.open_artifacts("mlflow-artifacts:/0/models/m-1/artifacts", "durable+http://127.0.0.1:1/mlflow")
    assert isinstance(found, DurableArtifacts)
    base = "http://127.0.0.1:1/mlflow/api/2.0/mlflow-artifacts/artifacts"
    assert found.artifact_uri == f"{base}/0/models/m-1/artifacts"


@pytest.mark.parametrize("uri", ["durable+http://", "durable+http:///x", "durable+https://h:99999"])
def test_addresses_that_cannot_be(uri: str) -> None:
    with pytest.raises(MlflowException, match="is not an address") as raised:
        durable.open_store(uri)
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


def test_commands_use_the_server_behind(monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke) -> None:
    assert server_behind("Durable+HTTPS://a:b@h/x") == "HTTPS://a:b@h/x"
    assert server_behind("sqlite:///durable+http://x") == "sqlite:///durable+http://x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "durable+http://h:1")
    assert uri_in_force(None) == "http://h:1"
    port = free_port()
    result = shufflenet("runs", "--tracking-uri", f"durable+http://127.0.0.1:{port}")
    assert result.exit_code == 1 and f"http://127.0.0.1:{port}" in result.stderr and "durable" not in result.stderr


def test_the_fluent_functions(dead: DurableStore, run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    """A script that continues a run which it knows; MLflow itself finds the store by the scheme."""
    uri = dead.uri.replace("http", "durable+http", 1)
    registry: Any = _tracking_store_registry
    before = dict(registry._registry)
    registry.register("durable+http", durable.open_store)
    try:
        store: Any = registry.get_store(uri)
        store._known[run_id] = client.get_run(run_id)
        mine = MlflowClient(uri)
        mine.log_metric(run_id, "loss", 1.0)
        mine.log_metric(run_id, "loss", 2.0)
        mine.log_batch(run_id, [Metric("f1", 1.0, 1, 1)], synchronous=False).wait()
        assert mine.log_param(run_id, "lr", 0.1) == 0.1
        with pytest.raises(MlflowException, match="Changing param values is not allowed"):
            mine.log_param(run_id, "lr", 0.2)
        mine.set_terminated(run_id, "KILLED")
    finally:
        registry._registry = before
        registry._get_store_with_resolved_uri.cache_clear()
    kinds = [entry.kind for entry in read_pending(folder_of(run_id)).entries]
    assert kinds == ["batch"] * 4 + ["update"]
    deliver(client, run_id)
    assert client.get_run(run_id).info.status == "KILLED"
    assert json.loads(json.dumps(client.get_run(run_id).data.params)) == {"lr": "0.1"}
