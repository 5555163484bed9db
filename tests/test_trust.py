"""A stranger's folder, store or server makes the commands contact nobody else and write nowhere else."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG, read_manifest
from shufflenet_mlflow.checkpoints.names import parse_name
from shufflenet_mlflow.checkpoints.references import run_folder
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.errors import TrackingError, UnresolvedError
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.names import DELETING_TAG, MODEL_VERSION_TAG
from shufflenet_mlflow.tracking.prune import prune_run
from shufflenet_mlflow.tracking.target import RunTarget
from shufflenet_mlflow.tracking.trust import check_artifact_address, remember_store, stores_file
from tests.support.command_line import Invoke
from tests.support.stranger import Stranger

RUN = "0123456789abcdef" * 2
STATE = {"state_dict": {"w": torch.zeros(3)}}


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    stranger = Stranger()
    yield stranger
    stranger.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the user credentials, as for a server that has a password."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def received(tmp_path: Path) -> Callable[[str], Path]:
    """Make a folder with a checkpoint whose journal names a store."""

    def make(uri: str) -> Path:
        folder = tmp_path / "received"
        save_checkpoint(STATE, 1, directory=folder)
        journal = Journal(folder)
        journal.set_owner(RUN, uri)
        journal.append(RUN, "tags", {"values": {"a": "b"}})
        journal.close()
        return folder

    return make


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("trust")).info.run_id)


def move_artifacts(run_id: str, artifact_uri: str) -> None:
    """Make the store say that a run's artifacts are elsewhere."""
    with sqlite3.connect("mlflow.db") as database:
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (artifact_uri, run_id))
    database.close()


def test_a_folder_names_a_strange_server(
    received: Callable[[str], Path], stranger: Stranger, shufflenet: Invoke
) -> None:
    folder = received(stranger.uri)
    result = shufflenet("sync", folder)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"store {stranger.uri}" in result.stderr and f"add --tracking-uri {stranger.uri}" in result.stderr
    assert shufflenet("sync", folder, "--dry-run").exit_code == 0
    listed = shufflenet("checkpoints", "ls", folder)
    assert listed.exit_code == 0 and "checkpoint-000001.pth.tar" in listed.stdout
    assert "was not contacted" in listed.stderr and "checkpoints in the run are not shown" in listed.stderr
    assert shufflenet("checkpoints", "prune", folder, "--keep-last", 1).exit_code == 1
    assert shufflenet("checkpoints", "verify", folder).exit_code == 0
    assert stranger.paths == []

    shufflenet("sync", folder, "--tracking-uri", stranger.uri)
    assert stranger.authorizations[0] == "Bearer secret"  # the user's own word
    count = len(stranger.paths)
    shufflenet("sync", folder)
    assert len(stranger.paths) > count  # and it holds


def test_an_address_with_credentials_is_not_known_by_its_host(
    received: Callable[[str], Path], stranger: Stranger, shufflenet: Invoke
) -> None:
    remember_store("http://good:5000")
    folder = received(f"http://good:5000@{stranger.uri.removeprefix('http://')}")
    result = shufflenet("sync", folder)
    assert result.exit_code == 1 and "was not contacted" in result.stderr
    assert stranger.paths == []


def test_a_folder_names_a_database(received: Callable[[str], Path], tmp_path: Path, shufflenet: Invoke) -> None:
    victim = tmp_path / "victim.db"
    result = shufflenet("sync", received(f"sqlite:///{victim}"))
    assert result.exit_code == 1 and str(victim) in result.stderr
    assert not victim.exists()


def test_a_folder_names_no_text(received: Callable[[str], Path], shufflenet: Invoke) -> None:
    result = shufflenet("sync", received(["http://evil"]))  # type: ignore[arg-type]
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: cannot read run")  # in the user's own store


def test_a_store_that_was_trained_with_is_known(
    small_train: Any, tmp_path: Path, workplace: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = small_train("--total-iters", 2, "--save-dir", tmp_path / "m")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert json.loads(shufflenet("sync", "m", "--json").stdout)["run_id"] == trained["run_id"]
    assert stores_file().read_text() == f"sqlite:///{workplace}/mlflow.db\n"
    assert stores_file().stat().st_mode & 0o077 == 0
    stores_file().unlink()
    assert "was not contacted" in shufflenet("sync", "m").stderr


def test_many_processes_remember_at_once() -> None:
    for number in (1, 2, 1):
        remember_store(f"http://host{number}:5000")
    remember_store("http://a\nhttp://b")
    assert stores_file().read_text() == "http://host1:5000\nhttp://host2:5000\n"


@pytest.mark.parametrize(
    "artifact_uri",
    [
        "http://{stranger}/x",
        "HTTP://{stranger}/x",
        "https://good:5000/x",  # the same host, another scheme
        "http://good/x",
        "http://good.evil:5000/x",
        "http://{stranger}\\@good:5000/x",
        "http://good:5000@{stranger}/x",
        "http://good:5000\t@{stranger}/x",
        "http://[good:5000/x",
        "http://good:99999/x",
        "mlflow-artifacts://{stranger}/x",
        f"runs:/{RUN}/x",
        "models:/m/1",
        "file:///home/victim",
        "/home/victim",
        "relative",
        f"file:///home/victim?/{RUN}/artifacts",
        f"file:///home/victim#/{RUN}/artifacts",
        f"file:///home/victim/{RUN}/artifacts/..",
        f"file:///home/victim/{RUN}/artifacts/%2e%2e/%2e%2e",
    ],
)
def test_artifacts_elsewhere_are_refused(artifact_uri: str) -> None:
    with pytest.raises(TrackingError, match="are said to be"):
        check_artifact_address(artifact_uri.replace("{stranger}", "127.0.0.1:9"), RUN, "http://good:5000")


@pytest.mark.parametrize(
    "artifact_uri",
    [
        f"mlflow-artifacts:/1/{RUN}/artifacts",
        f"mlflow-artifacts://good:5000/1/{RUN}/artifacts",
        "http://good:5000/api/2.0/mlflow-artifacts/artifacts/1",
        "http://known:5000/1",
        f"/shared/mlruns/1/{RUN}/artifacts",
        f"file:///shared/mlruns%20of%20all/1/{RUN}/artifacts",
        f"s3://bucket/1/{RUN}/artifacts",
    ],
)
def test_artifacts_where_they_usually_are(artifact_uri: str) -> None:
    remember_store("http://known:5000")
    check_artifact_address(artifact_uri, RUN, "http://me:pass@good:5000/")


def test_no_command_follows_a_run_to_a_strange_server(
    run_id: str, client: MlflowClient, stranger: Stranger, shufflenet: Invoke, tmp_path: Path
) -> None:
    other = client.create_run("0").info.run_id
    move_artifacts(run_id, f"{stranger.uri}/api/2.0/mlflow-artifacts/artifacts/1/{run_id}/artifacts")
    with pytest.raises(TrackingError, match=f"at {stranger.uri}/.*, a server that you have not named"):
        save_checkpoint(STATE, 1, directory=tmp_path, run_id=run_id)
    for words in (("checkpoints", "ls"), ("checkpoints", "verify"), ("eval",), ("compare", other)):
        result = shufflenet(*words, run_id)
        assert result.exit_code == 1, (words, result.output)
        assert "a server that you have not named" in result.stderr or "has no checkpoint" in result.stderr
    assert stranger.paths == []
    stores_file().parent.mkdir(parents=True, exist_ok=True)
    stores_file().write_text(stranger.uri + "\n")
    shufflenet("checkpoints", "ls", run_id)
    assert stranger.authorizations


def test_no_command_follows_a_run_into_a_local_folder(run_id: str, tmp_path: Path, shufflenet: Invoke) -> None:
    save_checkpoint(STATE, 1, directory=tmp_path / "checkpoints")
    move_artifacts(run_id, f"file://{tmp_path}")
    before = sorted(tmp_path.rglob("*"))
    for words in (("ls", run_id), ("prune", run_id, "--keep-last", 1)):
        result = shufflenet("checkpoints", *words)
        assert result.exit_code == 1 and f"in the local folder file://{tmp_path}" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_about_artifacts_goes_through_the_check() -> None:
    root = Path(__file__).parents[1] / "shufflenet_mlflow"
    own = {"tracking/artifacts.py", "export/logged.py"}
    calls = ("client.log_artifact", "client.log_text", "client.download_", "client.list_artifacts", "client.log_figure")
    found = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if path.relative_to(root).as_posix() not in own and any(call in path.read_text() for call in calls)
    ]
    assert found == []


def test_a_redirect_takes_no_credentials_along(stranger: Stranger, shufflenet: Invoke) -> None:
    named = Stranger(302, {"Location": stranger.uri.replace("127.0.0.1", "localhost")})
    try:
        result = shufflenet("runs", "--tracking-uri", named.uri)
    finally:
        named.close()
    assert result.exit_code == 1
    assert "Bearer secret" in named.authorizations
    assert stranger.paths and set(stranger.authorizations) == {None}


@pytest.mark.parametrize(
    "name", ["x/../checkpoint-000001.pth.tar", "x\\checkpoint-01.pth.tar", "\0checkpoint-1.pth.tar"]
)
def test_a_path_is_no_name_of_a_checkpoint(name: str) -> None:
    assert parse_name(name) is None
    assert parse_name(f"checkpoint-{'9' * 5000}.pth.tar") is None  # int() would raise


def test_a_run_asks_for_a_deletion_elsewhere(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    save_checkpoint(STATE, 1, directory=folder, run_id=run_id)
    path = save_checkpoint(STATE, 7, directory=victim)
    client.set_tag(run_id, DELETING_TAG, json.dumps([f"x/../../victim/{path.name}", 5]))
    prune_run(RunTarget(client, run_id, folder), Retention(keep_last=3))
    assert path.exists()


def test_a_manifest_leads_elsewhere(run_id: str, client: MlflowClient, tmp_path: Path, shufflenet: Invoke) -> None:
    path = save_checkpoint(STATE, 1, directory=tmp_path)
    manifest = read_manifest(path)
    assert manifest is not None
    outside = json.dumps({**vars(manifest), "path": f"checkpoints/../../../{path.name}"})
    client.set_tag(run_id, LATEST_TAG, outside)
    assert shufflenet("checkpoints", "pull", f"runs:/{run_id}").exit_code == 1
    with pytest.raises(TrackingError, match="is not the path of a file among the artifacts"):
        RunArtifacts(client, run_id).download(f"checkpoints/../../../{path.name}", tmp_path)
    client.create_registered_model("m")
    client.create_model_version("m", "somewhere", "../../../elsewhere", tags={MODEL_VERSION_TAG: manifest.to_json()})
    result = shufflenet("checkpoints", "pull", "models:/m/1")
    assert result.exit_code == 1 and "is not a run ID" in result.stderr


@pytest.mark.parametrize("run_id", ["..", "../x", "/etc", "a/b", "", "$(id)", "x" * 101])
def test_a_run_id_stays_below_its_folder(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(UnresolvedError, match="is not a run ID"):
        run_folder(tmp_path, run_id)


JUNK = [
    ("checkpoint", {"record": 5, "timestamp": 1}),
    ("checkpoint", {"record": {"path": 5}, "timestamp": 1}),
    ("checkpoint", {}),
    ("metrics", {"values": {"a": "x"}, "step": 1, "timestamp": 1}),
    ("metrics", {"values": 7, "step": 1, "timestamp": 1}),
    ("metrics", {"values": {"a": 1.0}, "step": "x", "timestamp": 1}),
    ("tags", {"values": 7}),
    ("tags", {"values": {"a": 5}}),
    ("params", {"values": [1]}),
    ("text", {"path": "../../x", "text": "x"}),
    ("text", {"path": "/x", "text": "x"}),
    ("text", {"path": 5, "text": 5}),
    ("input", {"name": 1, "digest": 2, "root": 3, "images": "x", "classes": [], "context": 4}),
    ("note", {"text": 5}),
    ("finish", {"status": "x", "end_time": "x", "iters": "x"}),
    ("finish", {"status": "x", "end_time": 1, "iters": 1}),
    ("prune", {"keep_last": "x", "keep_best": None, "keep_every": None}),
    ("reopen", {"tags": 5}),
    ("create", {"experiment": 5, "experiment_id": 5, "name": 5, "tags": 5, "start_time": 5}),
    ("batch", {"metrics": 5, "params": {}, "tags": {}}),
    ("batch", {"metrics": [{"key": "a"}], "params": {}, "tags": {}}),
    ("batch", {"metrics": [{"key": "a", "value": 1.0, "timestamp": "x", "step": 1}], "params": {}, "tags": {}}),
    ("batch", {"metrics": [{"key": "a", "value": 1.0, "timestamp": 1, "step": 1, "b": "c"}], "params": {}, "tags": {}}),
    ("batch", {"metrics": [], "params": {"a": 5}, "tags": {}}),
    ("inputs", {"datasets": [{"name": 5}], "models": []}),
    ("inputs", {"datasets": [{"other": "x"}], "models": []}),
    ("inputs", {"datasets": [], "models": [5]}),
    ("update", {"status": "LOST", "end_time": 1, "name": None}),
    ("update", {"status": 5, "end_time": 1, "name": None}),
    ("file", {"id": "../..", "name": "passwd", "folder": ""}),
    ("file", {"id": "0" * 16, "name": "../x", "folder": ""}),
    ("file", {"id": "0" * 16, "name": "missing", "folder": ""}),
    ("file", {"id": "0" * 16, "name": "x", "folder": "../.."}),
    ("unknown", {}),
]


@pytest.mark.parametrize(("kind", "body"), JUNK)
def test_a_journal_of_junk(
    kind: str, body: dict[str, Any], run_id: str, client: MlflowClient, tmp_path: Path, shufflenet: Invoke
) -> None:
    journal = Journal(tmp_path)
    journal.set_owner(run_id, client.tracking_uri)
    journal.append(run_id, kind, body)
    journal.close()
    for words in (("sync", tmp_path, "--dry-run"), ("checkpoints", "ls", tmp_path), ("sync", tmp_path)):
        result = shufflenet(*words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "spool.refused.jsonl").exists()
