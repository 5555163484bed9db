"""References to checkpoints, and what they resolve to."""

import json
import logging
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from shufflenet_mlflow import get_lastest_model, get_latest_model, save_checkpoint
from shufflenet_mlflow.checkpoints.references import ModelReference, RunReference, parse_reference
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import BusyError, CorruptCheckpointError, TrackingError, UnresolvedError
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.tracking import courier
from shufflenet_mlflow.tracking import downloads as fetching
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.resolve import resolve

ID = "0123456789abcdef" * 2


def state(value: float = 0.0) -> dict[str, object]:
    return {"state_dict": {"w": torch.full((10,), value)}}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ID, RunReference(ID)),
        (f"runs:/{ID}", RunReference(ID)),
        (f"runs:/{ID}@latest", RunReference(ID, "latest")),
        (f"runs:/{ID}@best", RunReference(ID, "best")),
        (f"{ID}@1200", RunReference(ID, 1200)),
        (f"runs:/{ID}/checkpoints/x.pth.tar", RunReference(ID, artifact="checkpoints/x.pth.tar")),
        ("models:/net@champion", ModelReference("net", "champion")),
        ("models:/net/3", ModelReference("net", None, "3")),
        ("some/folder", Path("some/folder")),
        (ID[:-1], RunReference(ID[:-1])),
        (f"runs:/{ID[:6]}@best", RunReference(ID[:6], "best")),
        (ID[:5], Path(ID[:5])),
        (f"{ID[:8]}/x", Path(ID[:8], "x")),
    ],
)
def test_forms(text: str, expected: object) -> None:
    assert parse_reference(text) == expected


def test_an_existing_path_wins_over_a_look_alike_run_id(workplace: Path) -> None:
    (workplace / ID).mkdir()
    assert parse_reference(ID) == Path(ID)


@pytest.mark.parametrize("text", [f"runs:/{ID}@newest", "runs:/abc", "models:/net", "models:/net/x"])
def test_unknown_forms_of_references(text: str) -> None:
    with pytest.raises(UnresolvedError) as caught:
        parse_reference(text)
    assert repr(text) in str(caught.value)


# ---------------------------------------------------------------- folders


def test_folder(tmp_path: Path) -> None:
    for iters, tag in ((999_999, ""), (1_000_000, "x-"), (5, "bnps-")):
        write_checkpoint(state(), iters, tag, directory=tmp_path)
    (tmp_path / "notes.txt").write_text("checkpoint-9999999.pth.tar")
    (tmp_path / "checkpoint-2000000.pth.tar").mkdir()
    assert get_latest_model(tmp_path) == (tmp_path / "x-checkpoint-1000000.pth.tar", 1_000_000)
    assert get_lastest_model is get_latest_model


def test_default_folder(workplace: Path) -> None:
    assert get_latest_model() == (None, 0)
    save_checkpoint(state(), 3)
    assert get_latest_model() == (Path("models/checkpoint-000003.pth.tar"), 3)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    assert get_latest_model(tmp_path) == (None, 0)
    assert get_latest_model(str(tmp_path / "nowhere")) == (None, 0)
    with pytest.raises(UnresolvedError, match="is a folder without checkpoints"):
        resolve(tmp_path)
    with pytest.raises(UnresolvedError, match="does not exist; a checkpoint is a checkpoint file, a folder"):
        resolve(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1000), b"PQ"])
def test_invalid_files_are_passed_over(content: bytes, tmp_path: Path) -> None:
    good, _ = write_checkpoint(state(), 1, directory=tmp_path)
    (tmp_path / "checkpoint-000002.pth.tar").write_bytes(content)
    assert get_latest_model(tmp_path) == (good, 1)


def test_a_corrupt_newest_checkpoint_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, _ = write_checkpoint(state(), 1, directory=tmp_path)
    bad, _ = write_checkpoint(state(), 2, directory=tmp_path)
    flip(bad)
    with caplog.at_level(logging.WARNING):
        assert get_latest_model(tmp_path) == (good, 1)
    assert str(bad) in caplog.text
    assert "is corrupt" in caplog.text
    flip(good)
    with pytest.raises(UnresolvedError, match=r"no checkpoint verifies \(2 tried\)"):
        get_latest_model(tmp_path)
    with pytest.raises(CorruptCheckpointError):
        get_latest_model(bad)


# ---------------------------------------------------------------- runs


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("x"), run_name="a run").info.run_id)


def fill_run(run_id: str, folder: Path) -> None:
    for iters, top1 in ((10, 0.5), (20, 0.9), (30, 0.7)):
        save_checkpoint(state(iters), iters, epoch=1, loss=0.5, directory=folder, run_id=run_id, val_top1=top1)


def test_run(run_id: str, tmp_path: Path) -> None:
    fill_run(run_id, tmp_path / "models")
    cache = tmp_path / "cache"
    path, iters = get_latest_model(run_id, cache_dir=cache)
    assert iters == 30
    assert path is not None
    assert cache in path.parents
    assert read_checkpoint(path)["state_dict"]["w"][0] == 30
    assert resolve(f"runs:/{run_id}@best", cache_dir=cache).iters == 20
    assert resolve(f"runs:/{run_id}@10", cache_dir=cache).iters == 10
    assert resolve(f"runs:/{run_id}/checkpoints/checkpoint-000010.pth.tar", cache_dir=cache).iters == 10
    # What was fetched is a folder of checkpoints like any other.
    assert get_latest_model(path.parent) == (path, 30)


def test_nothing_is_fetched_twice_and_the_cache_heals(
    run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_run(run_id, tmp_path / "models")
    fetched: list[str] = []
    original = LocalArtifactRepository.download_artifacts

    def counting(self: LocalArtifactRepository, artifact_path: str, dst_path: str | None = None) -> str:
        fetched.append(artifact_path)
        return str(original(self, artifact_path, dst_path))

    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", counting)
    path, _ = get_latest_model(run_id, cache_dir=tmp_path / "cache")
    get_latest_model(run_id, cache_dir=tmp_path / "cache")
    assert fetched == ["checkpoints/checkpoint-000030.pth.tar"]
    assert path is not None
    flip(path)
    assert get_latest_model(run_id, cache_dir=tmp_path / "cache") == (path, 30)
    verify_checkpoint(path)
    assert len(fetched) == 2


@pytest.mark.parametrize("moment", ["before it is locked", "when it is locked", "while"])
def test_a_folder_that_another_process_takes_for_stale(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process removes the folder for a download before the first has locked it."""
    removed: list[Path] = []

    def late(path: Path, name: str) -> FileLock:
        if removed:
            return FileLock(path, name)
        removed.append(path.parent)
        if moment == "while":
            raise BusyError(name)
        lock = FileLock(path, name) if moment == "when it is locked" else None
        shutil.rmtree(path.parent)
        return lock or FileLock(path, name)

    monkeypatch.setattr(fetching, "FileLock", late)
    with fetching.scratch_folder(tmp_path) as scratch:
        assert scratch.is_dir()
        assert scratch != removed[0]
        with pytest.raises(BusyError):
            FileLock(scratch / "lock", "it")
    assert not scratch.exists()


def test_leftovers_in_the_cache_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".fetch-x").mkdir()
    (tmp_path / ".fetch-x" / "lock").touch()
    (tmp_path / ".fetch-x" / "half").write_bytes(b"half")
    with fetching.scratch_folder(tmp_path) as first, fetching.scratch_folder(tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
    assert not list(tmp_path.iterdir())


def test_resolving_reads_one_tag_and_lists_nothing(
    run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_run(run_id, tmp_path / "models")

    def refuse(*_arguments: object) -> None:
        pytest.fail("listed the artifacts")

    monkeypatch.setattr(MlflowClient, "list_artifacts", refuse)
    assert resolve(run_id, cache_dir=tmp_path / "cache").iters == 30
    assert resolve(f"runs:/{run_id}@best", cache_dir=tmp_path / "cache").iters == 20


def artifact(client: MlflowClient, run_id: str, name: str) -> Path:
    return Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "checkpoints" / name


def test_a_corrupt_artifact_is_passed_over_and_the_cache_stays_clean(
    run_id: str, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_run(run_id, tmp_path / "models")
    flip(artifact(client, run_id, "checkpoint-000030.pth.tar"))
    cache = tmp_path / "cache"
    with caplog.at_level(logging.WARNING):
        path, iters = get_latest_model(run_id, cache_dir=cache)
    assert iters == 20
    assert "checkpoint-000030.pth.tar" in caplog.text
    assert path is not None
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, path.name + ".json"]
    artifact(client, run_id, "checkpoint-000020.pth.tar").unlink()
    assert get_latest_model(run_id, cache_dir=tmp_path / "other")[1] == 10
    with pytest.raises(CorruptCheckpointError, match="SHA-256"):
        resolve(f"runs:/{run_id}@30", cache_dir=cache)


def test_a_missing_checkpoint_lists_what_exists(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(UnresolvedError, match=r"\(a run\) has no checkpoint.latest; .* no checkpoints"):
        resolve(run_id)
    fill_run(run_id, tmp_path)
    with pytest.raises(UnresolvedError, match="no checkpoint at iteration 15; it has: 10, 20, 30"):
        resolve(f"{run_id}@15")
    with pytest.raises(UnresolvedError, match=f"there is no run {ID} in sqlite:.*--tracking-uri"):
        resolve(ID)
    with pytest.raises(UnresolvedError, match="'config.json' is not named like a checkpoint"):
        resolve(f"runs:/{run_id}/config.json")
    client.delete_tag(run_id, "checkpoint.latest")
    with pytest.raises(UnresolvedError, match="checkpoint-000030.pth.tar, checkpoint-000020.pth.tar"):
        resolve(run_id)


def test_a_record_cannot_lead_out_of_the_cache(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    fill_run(run_id, tmp_path / "models")
    manifest = json.loads(client.get_run(run_id).data.tags["checkpoint.latest"])
    for path in ("checkpoints/..", "../../x", "checkpoints/.hidden"):
        client.set_tag(run_id, "checkpoint.latest", json.dumps({**manifest, "path": path}))
        with pytest.raises(UnresolvedError, match="not named like a checkpoint"):
            resolve(run_id, cache_dir=tmp_path / "cache")


def test_registered_models(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    fill_run(run_id, tmp_path / "models")
    client.create_registered_model("net")
    best = client.get_run(run_id).data.tags["checkpoint.best"]
    client.create_model_version("net", f"runs:/{run_id}/checkpoints", run_id, tags={"checkpoint": best})
    client.create_model_version("net", f"runs:/{run_id}/checkpoints/checkpoint-000010.pth.tar", run_id)
    client.create_model_version("net", f"runs:/{run_id}/elsewhere", run_id)
    client.set_registered_model_alias("net", "champion", "1")
    cache = tmp_path / "cache"
    assert resolve("models:/net@champion", cache_dir=cache).iters == 20
    assert resolve("models:/net/2", cache_dir=cache).iters == 10
    with pytest.raises(UnresolvedError, match="which is not a checkpoint"):
        resolve("models:/net/3", cache_dir=cache)
    with pytest.raises(UnresolvedError, match="net has the aliases: @champion"):
        resolve("models:/net@challenger", cache_dir=cache)
    with pytest.raises(UnresolvedError, match="registered models: net"):
        resolve("models:/nett/1", cache_dir=cache)


def test_a_dead_server_is_one_line_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as caught:
        resolve(ID, tracking_uri="http://user:secret@127.0.0.1:9")
    assert "connection refused" in str(caught.value)
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- save_checkpoint with MLflow


def test_save_checkpoint_logs_to_the_active_run(client: MlflowClient, tmp_path: Path) -> None:
    with mlflow.start_run() as run:
        path = save_checkpoint(state(), 40, "x-", epoch=2, loss=0.125, directory=tmp_path)
    run_id = run.info.run_id
    metrics = client.get_run(run_id).data.metrics
    assert (metrics["epoch"], metrics["loss"]) == (2, 0.125)
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [40]
    manifest = json.loads(client.get_run(run_id).data.tags["checkpoint.latest"])
    assert manifest["path"] == "checkpoints/x-checkpoint-000040.pth.tar"
    assert manifest["bytes"] == path.stat().st_size
    assert artifact(client, run_id, path.name).read_bytes() == path.read_bytes()
    assert "checkpoint.best" not in client.get_run(run_id).data.tags


def test_save_checkpoint_without_a_run_stays_local(client: MlflowClient, tmp_path: Path) -> None:
    save_checkpoint(state(), 1, directory=tmp_path)
    assert client.search_runs([e.experiment_id for e in client.search_experiments()]) == []


def test_latest_never_moves_back_and_nan_is_never_best(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    for iters, top1 in ((10, 0.5), (20, float("nan")), (5, 0.4), (6, 0.6), (20, None)):
        save_checkpoint(state(), iters, loss=1.0, directory=tmp_path, run_id=run_id, val_top1=top1)
    tags = client.get_run(run_id).data.tags
    assert json.loads(tags["checkpoint.latest"])["iters"] == 20
    assert json.loads(tags["checkpoint.best"])["iters"] == 6
    assert sorted(point.step for point in client.get_metric_history(run_id, "loss")) == [5, 6, 10, 20]


def test_the_tag_does_not_move_when_the_upload_fails(
    run_id: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(state(), 10, directory=tmp_path, run_id=run_id, val_top1=0.1)
    before = client.get_run(run_id).data.tags

    def refuse(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunArtifacts, "put_file", refuse)
    save_checkpoint(state(), 20, directory=tmp_path, run_id=run_id, val_top1=0.2)
    assert client.get_run(run_id).data.tags == before
    assert get_latest_model(tmp_path)[1] == 20  # the local file is safe
    courier.let_go(tmp_path)
