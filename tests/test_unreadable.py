"""A checkpoint that cannot be read or fetched has not failed verification: no older one takes its place.

Two real failures of a disk, which root meets too: `/proc/self/mem` is a file whose reading is an I/O error, and a file
system in memory of one megabyte is soon full.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import get_latest_model, save_checkpoint
from shufflenet_mlflow.checkpoints.folders import list_checkpoints, newest_valid
from shufflenet_mlflow.checkpoints.manifest import manifest_path
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import open_checkpoint
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import (
    CheckpointError,
    ResumeError,
    TrackingError,
    UnreadableCheckpointError,
    UnresolvedError,
)
from shufflenet_mlflow.tracking.prune import choose_dropped
from shufflenet_mlflow.tracking.resolve import resolve
from tests.support.command_line import Invoke
from tests.support.mlflow_server import Server
from tests.support.proxy import Proxy
from tests.support.training import Reporter, run, run_until


def state(value: float = 0.0, numbers: int = 10) -> dict[str, object]:
    return {"state_dict": {"w": torch.full((numbers,), value)}}


def fill_run(run_id: str, folder: Path, numbers: int = 10) -> None:
    for iters in (100, 200, 300):
        save_checkpoint(state(iters, numbers), iters, directory=folder, run_id=run_id, val_top1=iters / 1000)


def artifact(client: MlflowClient, run_id: str, name: str) -> Path:
    return Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "checkpoints" / name


def make_unreadable(path: Path) -> None:
    """Put a file with an I/O error in its place."""
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("x"), run_name="a run").info.run_id)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a megabyte."""
    folder = tmp_path / "full"
    folder.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("with_manifest", [True, False])
def test_an_io_error_is_not_a_corrupt_file(with_manifest: bool, tmp_path: Path) -> None:
    write_checkpoint(state(), 1, directory=tmp_path)
    bad, _ = write_checkpoint(state(), 2, directory=tmp_path)
    make_unreadable(bad)
    if not with_manifest:
        manifest_path(bad).unlink()
    else:  # whose size it must have to be read at all
        content = json.loads(manifest_path(bad).read_text())
        del content["crc32"]
        manifest_path(bad).write_text(json.dumps({**content, "bytes": bad.stat().st_size}))
    with pytest.raises(UnreadableCheckpointError, match="Input/output error; make it readable"):
        newest_valid(tmp_path)
    with pytest.raises(UnreadableCheckpointError, match="Input/output error"):
        get_latest_model(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write_checkpoint(state(), 1, directory=tmp_path)
    bad, _ = write_checkpoint(state(), 2, directory=tmp_path)
    bad.chmod(0)
    with pytest.raises(UnreadableCheckpointError, match="Permission denied"):
        newest_valid(tmp_path)


def test_an_io_error_while_the_content_is_loaded(tmp_path: Path) -> None:
    path, _ = write_checkpoint(state(), 1, directory=tmp_path)
    checkpoint = open_checkpoint(path)
    make_unreadable(path)
    with pytest.raises(CheckpointError):
        checkpoint.read()
    manifest_path(path).unlink()
    with pytest.raises(UnreadableCheckpointError, match="Input/output error"):
        open_checkpoint(path)


def test_training_does_not_start_from_an_older_file(images: Path) -> None:
    run_until(images, "training", 6, "--save-dir", "models", "--save-interval", 3)
    newest, older, *_ = list_checkpoints(Path("models"))
    assert older.name < newest.name
    manifest_path(newest).unlink()
    make_unreadable(newest)
    with pytest.raises(UnreadableCheckpointError, match="Input/output error"):
        run(images, "--save-dir", "models")


def test_pruning_keeps_what_cannot_be_read_and_the_newest_that_verifies(tmp_path: Path) -> None:
    for iters in (1, 2, 3, 4):
        write_checkpoint(state(), iters, directory=tmp_path)
    newest = tmp_path / "checkpoint-000004.pth.tar"
    make_unreadable(newest)
    content = json.loads(manifest_path(newest).read_text())
    del content["crc32"]
    manifest_path(newest).write_text(json.dumps({**content, "bytes": newest.stat().st_size}))
    dropped = choose_dropped(tmp_path, Retention(keep_last=1), target=None)
    assert [item.manifest.iters for item in dropped] == [1, 2]


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("which", ["", "@best", "@300"])
def test_a_full_cache_is_named_and_nothing_older_is_taken(
    which: str, run_id: str, tmp_path: Path, full_disk: Path
) -> None:
    fill_run(run_id, tmp_path / "models", numbers=20_000)
    (full_disk / "filler").write_bytes(bytes(1000 * 1024))
    with pytest.raises(
        UnresolvedError, match=r"No space left on device; --cache-dir or SHUFFLENET_CACHE_DIR"
    ) as caught:
        resolve(f"runs:/{run_id}{which}", cache_dir=full_disk)
    assert caught.value.code == "cache-unusable"
    (full_disk / "filler").unlink()
    assert resolve(run_id, cache_dir=full_disk).iters == 300


@pytest.mark.long
def test_a_full_cache_behind_a_server(
    server: Server, tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run_id = MlflowClient(server.uri).create_run("0").info.run_id
    fill_run(run_id, tmp_path / "models", numbers=20_000)
    (full_disk / "filler").write_bytes(bytes(1000 * 1024))
    with pytest.raises(UnresolvedError, match=r"No space left on device; --cache-dir"):
        resolve(run_id, cache_dir=full_disk)


def test_resuming_says_that_the_disk_is_full(
    images: Path, client: MlflowClient, full_disk: Path, shufflenet: Invoke
) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    # An older checkpoint of the run on this disk does not take the place of the one that cannot be fetched.
    older = Path("models/checkpoint-000005.pth.tar")
    assert older.exists()
    for path in list_checkpoints(Path("models")):
        if path.name > older.name:
            path.unlink()
    (full_disk / "filler").write_bytes(bytes(1000 * 1024))
    before = client.get_run(stopped.run_id)
    for save_dir in ("models", "elsewhere"):
        result = shufflenet(
            *("train", "--resume", stopped.run_id, "--save-dir", save_dir, "--cache-dir", full_disk, "--device", "cpu")
        )
        assert result.exit_code == 1, result.output
        [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert "No space left on device; --cache-dir" in line
    assert client.get_run(stopped.run_id).data.tags == before.data.tags


def test_no_room_for_a_manifest(run_id: str, tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_run(run_id, tmp_path / "models")
    (full_disk / "filler").write_bytes(bytes(1000 * 1024))
    with open(full_disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(512))
    monkeypatch.setattr("tempfile.tempdir", str(full_disk))
    with pytest.raises(TrackingError, match=r"cannot read the manifest of checkpoint-000100.*TMPDIR names"):
        resolve(f"{run_id}@100", cache_dir=tmp_path / "cache")


# ---------------------------------------------------------------- a store that does not give the newest one


def test_an_artifact_that_cannot_be_read_is_not_passed_over(run_id: str, client: MlflowClient, tmp_path: Path) -> None:
    fill_run(run_id, tmp_path / "models")
    newest = artifact(client, run_id, "checkpoint-000300.pth.tar")
    make_unreadable(newest)
    with pytest.raises(TrackingError, match=r"; no older checkpoint takes its place") as caught:
        resolve(run_id, cache_dir=tmp_path / "cache")
    assert caught.value.code == "newest-not-downloaded"
    newest.unlink()  # now MLflow itself says that it is gone
    assert resolve(run_id, cache_dir=tmp_path / "cache").iters == 200


def test_a_503_for_the_newest_artifact_only(
    server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_id = MlflowClient(proxy.uri).create_run("0").info.run_id
    fill_run(run_id, tmp_path / "models")
    proxy.choose = lambda _method, path: "503" if path.endswith("checkpoint-000300.pth.tar") else "pass"
    with pytest.raises(TrackingError, match="503.*; no older checkpoint takes its place: try again"):
        resolve(run_id, cache_dir=tmp_path / "cache")
    assert proxy.refused
    proxy.choose = None
    assert resolve(run_id, cache_dir=tmp_path / "cache").iters == 300


def test_a_store_that_comes_back_does_not_let_an_older_file_rewind_the_run(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is away while the checkpoint is looked for, and answers when the run is opened."""
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    for path in list_checkpoints(Path("models")):
        if path.name > "checkpoint-000005.pth.tar":
            path.unlink()
    before = client.get_run(stopped.run_id).data.tags

    def away(*_arguments: object) -> None:
        raise TrackingError("cannot read the run: connection refused")

    monkeypatch.setattr("shufflenet_mlflow.workflows.training.resume.latest_of_run", away)
    with pytest.raises(ResumeError, match="is already at iteration 6, and this checkpoint is from iteration"):
        run(images, "--resume", stopped.run_id, "--save-dir", "models")
    assert client.get_run(stopped.run_id).data.tags == before


def test_a_newer_file_on_this_disk_is_taken_when_the_runs_latest_does_not_verify(
    images: Path, client: MlflowClient
) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    for path in list_checkpoints(Path("models")):
        if path.name > "checkpoint-000005.pth.tar":
            path.unlink()
    for iters in (5, 6):
        artifact(client, stopped.run_id, f"checkpoint-{iters:06}.pth.tar").write_bytes(b"PK")
    reporter = Reporter()
    assert run(images, "--resume", stopped.run_id, "--save-dir", "models", reporter=reporter).result.iters == 12
    assert any("from iteration 5 (models/" in note for note in reporter.notes), reporter.notes
