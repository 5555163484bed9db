"""`shufflenet checkpoints` and `shufflenet sync`, as typed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.messages import MetricPoints, to_body
from shufflenet_mlflow.tracking.trust import remember_store
from tests.support.command_line import Invoke, small_options


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    """Save four checkpoints in ./models and in a run; the second is the best."""
    run_id = str(client.create_run(client.create_experiment("commands")).info.run_id)
    for iters in (10, 20, 30, 40):
        state = {"state_dict": {"w": torch.full((3,), float(iters))}, "epoch": iters // 10, "loss": 1 / iters}
        save_checkpoint(state, iters, val_top1={20: 0.9, 30: 0.5}.get(iters), run_id=run_id, directory="models")
    journal = Journal(Path("models"))
    journal.set_owner(run_id, client.tracking_uri)
    journal.close()
    return run_id


@pytest.fixture
def as_json(shufflenet: Invoke) -> Callable[..., Any]:
    def invoke(*words: object, status: int = 0) -> Any:
        result = shufflenet(*words, "--json")
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)

    return invoke


def test_ls_of_a_folder_and_of_its_run(run_id: str, as_json: Callable[..., Any], shufflenet: Invoke) -> None:
    rows = as_json("checkpoints", "ls", "models")
    assert [(row["iters"], row["latest"], row["best"]) for row in rows] == [
        (40, True, False),
        (30, False, False),
        (20, False, True),
        (10, False, False),
    ]
    assert all(row["local"] and row["remote"] and not row["pending"] and not row["promoted"] for row in rows)
    assert (rows[2]["epoch"], rows[2]["loss"], rows[2]["val_top1"]) == (2, 0.05, 0.9)
    assert len(rows[0]["sha256"]) == 64
    in_run = as_json("checkpoints", "ls", run_id)
    assert [{**row, "local": True} for row in in_run] == rows
    text = shufflenet("checkpoints", "ls", "models").stdout.splitlines()
    assert text[0].split() == ["iters", "epoch", "loss", "val_top1", "size", "sha256", "where", "marks", "file"]
    assert text[3].split()[:4] == ["20", "2", "0.0500", "0.9000"]
    assert "local+remote" in text[3]
    assert " best " in text[3]


def test_ls_shows_what_is_pending_and_what_is_only_there(
    run_id: str, client: MlflowClient, as_json: Callable[..., Any]
) -> None:
    from shufflenet_mlflow.checkpoints.writing import write_checkpoint

    manifest = write_checkpoint({"state_dict": {"w": torch.ones(2)}}, 50, directory="models").manifest
    journal = Journal(Path("models"))
    journal.append(run_id, "checkpoint", to_body(Checkpoint.of(manifest)))
    journal.close()
    Path("models/checkpoint-000010.pth.tar").unlink()
    client.create_registered_model("pets")
    client.create_model_version("pets", f"runs:/{run_id}/checkpoints/checkpoint-000030.pth.tar", run_id)
    rows = {row["iters"]: row for row in as_json("checkpoints", "ls", "models")}
    assert (rows[50]["local"], rows[50]["remote"], rows[50]["pending"]) == (True, False, True)
    assert (rows[10]["local"], rows[10]["remote"], rows[10]["pending"]) == (False, True, False)
    assert [iters for iters, row in rows.items() if row["promoted"]] == [30]


def test_ls_of_a_folder_works_without_its_server(
    run_id: str, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> Any:
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(MlflowClient, "get_run", refuse)
    result = shufflenet("checkpoints", "ls", "models", "--json")
    rows = json.loads(result.stdout)
    assert [(row["iters"], row["remote"], row["latest"], row["best"]) for row in rows] == [
        (40, None, True, False),
        (30, None, False, False),
        (20, None, False, True),
        (10, None, False, False),
    ]
    assert "connection refused; checkpoints in the run are not shown" in result.stderr


def test_verify(run_id: str, as_json: Callable[..., Any], shufflenet: Invoke) -> None:
    assert all(verdict["ok"] for verdict in as_json("checkpoints", "verify", "models"))
    path = Path("models/checkpoint-000030.pth.tar")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    verdicts = as_json("checkpoints", "verify", "models", status=1)
    assert [verdict["file"] for verdict in verdicts if not verdict["ok"]] == [path.name]
    assert "SHA-256 is not the recorded" in verdicts[1]["reason"]
    assert shufflenet("checkpoints", "verify", path).exit_code == 1
    assert shufflenet("checkpoints", "verify", "models/checkpoint-000040.pth.tar").stdout.startswith("ok ")
    assert all(verdict["ok"] for verdict in as_json("checkpoints", "verify", run_id))  # the run's own is sound


def test_verify_of_a_run_needs_a_cache(run_id: str, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", "file")
    result = shufflenet("checkpoints", "verify", run_id)
    assert result.exit_code == 1
    assert "in the cache folder 'file/runs/" in result.stderr
    assert "Not a directory; --cache-dir or SHUFFLENET_CACHE_DIR names another" in result.stderr


def test_verify_of_a_run_finds_what_is_damaged_or_missing_there(
    run_id: str, client: MlflowClient, as_json: Callable[..., Any], workplace: Path
) -> None:
    folder = Path(str(client.get_run(run_id).info.artifact_uri).removeprefix("file://")) / "checkpoints"
    damaged = folder / "checkpoint-000020.pth.tar"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    (folder / "checkpoint-000040.pth.tar").unlink()
    verdicts = {verdict["file"][11:17]: verdict for verdict in as_json("checkpoints", "verify", run_id, status=1)}
    assert {name for name, verdict in verdicts.items() if not verdict["ok"]} == {"000020", "000040"}
    assert "its manifest says" in verdicts["000020"]["reason"]
    assert "cannot download" in verdicts["000040"]["reason"]


def test_pull(run_id: str, as_json: Callable[..., Any], shufflenet: Invoke, tmp_path: Path) -> None:
    pulled = as_json("checkpoints", "pull", f"runs:/{run_id}@best", "--output", tmp_path / "here")
    path = Path(pulled["path"])
    assert (path.parent, path.name, pulled["iters"]) == (tmp_path / "here", "checkpoint-000020.pth.tar", 20)
    assert path.read_bytes() == Path("models/checkpoint-000020.pth.tar").read_bytes()
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    cached = shufflenet("checkpoints", "pull", run_id, "--cache-dir", tmp_path / "cache").stdout.strip()
    assert Path(cached) == tmp_path / "cache" / "runs" / run_id / "checkpoint-000040.pth.tar"
    (tmp_path / "file").write_text("")
    result = shufflenet("checkpoints", "pull", run_id, "--output", tmp_path / "file")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--output names another folder" in result.stderr


def test_prune(run_id: str, as_json: Callable[..., Any], shufflenet: Invoke) -> None:
    planned = as_json("checkpoints", "prune", "models", "--keep-last", 1, "--dry-run")
    assert [item["iters"] for item in planned["dropped"]] == [10, 30]
    assert len(list_checkpoints(Path("models"))) == 4
    done = as_json("checkpoints", "prune", "models", "--keep-last", 1)
    assert done["dropped"] == planned["dropped"]
    assert [row["iters"] for row in as_json("checkpoints", "ls", "models")] == [40, 20]
    assert [row["iters"] for row in as_json("checkpoints", "ls", run_id)] == [40, 20]
    assert "deleted 0 checkpoints" in shufflenet("checkpoints", "prune", run_id, "--keep-last", 1).stdout


def test_prune_of_a_run_leaves_the_disk_alone(run_id: str, as_json: Callable[..., Any]) -> None:
    done = as_json("checkpoints", "prune", run_id, "--keep-every", 20)
    assert [(item["iters"], item["on_disk"], item["in_run"]) for item in done["dropped"]] == [
        (10, False, True),
        (30, False, True),
    ]
    assert len(list_checkpoints(Path("models"))) == 4


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["prune", "models"], 2, "nothing says what to keep; give --keep-last, --keep-best or --keep-every"),
        (["prune", "models", "--keep-last", "0"], 2, "--keep-last (=0) must be at least 1"),
        (["ls", "nowhere"], 1, "'nowhere' is neither a folder of checkpoints nor a run ID"),
        (["ls", "0" * 32], 1, "there is no run"),
        (["ls", "models:/pets/1"], 1, "is neither a folder of checkpoints nor a run ID"),
        (["verify", "."], 1, "'.' holds no checkpoints"),
        (["pull", "nowhere"], 1, "'nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line(words: list[str], status: int, message: str, run_id: str, shufflenet: Invoke) -> None:
    result = shufflenet("checkpoints", *words)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_prune_while_a_run_is_trained_there(run_id: str, shufflenet: Invoke) -> None:
    journal = Journal(Path("models"))
    result = shufflenet("checkpoints", "prune", "models", "--keep-last", 1)
    journal.close()
    assert result.exit_code == 1
    assert "the folder 'models' is in use" in result.stderr


def test_sync(run_id: str, client: MlflowClient, as_json: Callable[..., Any], shufflenet: Invoke) -> None:
    assert "nothing is pending in models" in shufflenet("sync", "models").stdout
    journal = Journal(Path("models"))
    journal.append(run_id, "metrics", to_body(MetricPoints({"val/top1": 0.5}, 10, 1)))
    journal.close()
    waiting = as_json("sync", "models", "--dry-run")
    assert (waiting["pending"], waiting["pending_by_kind"], waiting["sent"]) == (1, {"metrics": 1}, 0)
    assert "1 entry is pending for" in shufflenet("sync", "models", "--dry-run").stdout
    sent = as_json("sync", "models")
    assert (sent["pending"], sent["sent"], sent["run_id"]) == (0, 1, run_id)
    assert client.get_run(run_id).data.metrics["val/top1"] == 0.5
    assert shufflenet("sync", "models").stdout == "nothing is pending in models\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sync"], "is not a folder; name the one that --save-dir named"),
        (["checkpoints", "ls"], "is neither a folder of checkpoints nor a run ID"),
        (["checkpoints", "verify"], "does not exist; a checkpoint is"),
        (["train", "--total-iters", 1, "--save-dir"], "File name too long; choose another folder with --save-dir"),
    ],
)
def test_a_folder_whose_name_is_too_long(words: list[object], message: str, shufflenet: Invoke) -> None:
    result = shufflenet(*words, "x" * 300)
    assert result.exit_code == 1
    assert message in result.stderr


def test_sync_finds_the_store_by_itself(
    run_id: str, client: MlflowClient, as_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = Path("models").absolute()
    remember_store(client.tracking_uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert as_json("sync", models)["tracking_uri"] == client.tracking_uri
    assert [row["remote"] for row in as_json("checkpoints", "ls", models)] == [True] * 4
    assert not list(tmp_path.iterdir())


def test_keep_rules_are_checked_before_training(images: Path, shufflenet: Invoke) -> None:
    result = shufflenet("train", *small_options(images), "--keep-best", 0)
    assert result.exit_code == 2
    assert "--keep-best (=0) must be at least 1" in result.stderr
