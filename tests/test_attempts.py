"""A run that reaches an iteration again: no name among its artifacts ever carries other bytes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import (
    attempt_name,
    attempt_prefix,
    checkpoint_name,
    local_name,
    newest_first,
    parse_name,
)
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import ConfigError, TrackingError
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.names import DELETING_TAG
from shufflenet_mlflow.tracking.prune import prune_run
from shufflenet_mlflow.tracking.remote_checkpoints import RemoteCheckpoints
from shufflenet_mlflow.tracking.resolve import resolve
from shufflenet_mlflow.tracking.target import RunTarget
from shufflenet_mlflow.tracking.trust import remember_store
from tests.support.command_line import Invoke

PLAIN = "checkpoint-000002.pth.tar"


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("attempts")).info.run_id)


@pytest.fixture
def target(client: MlflowClient, run_id: str) -> RunTarget:
    return RunTarget(client, run_id, Path("models"))


def commit(target: RunTarget, value: float, iters: int = 2, *, val_top1: float | None = None) -> CheckpointManifest:
    """Write a checkpoint with this content to the disk, and commit it."""
    state = {"state_dict": {"w": torch.full((3,), value)}}
    manifest = write_checkpoint(
        state, iters, val_top1=val_top1, directory=target.directory, run_id=target.run_id
    ).manifest
    Checkpoint.of(manifest).send(target)
    return manifest


def listed(target: RunTarget) -> dict[str, str]:
    """Return the SHA-256 of each checkpoint among the artifacts, by name."""
    names = [name for name in RunArtifacts(target.client, target.run_id).sizes() if not name.endswith(".json")]
    paths = {name: target.client.download_artifacts(target.run_id, f"checkpoints/{name}") for name in names}
    return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in paths.items()}


def tagged(target: RunTarget, tag: str) -> CheckpointManifest:
    return CheckpointManifest.from_json(target.read().data.tags[tag])


def check_tags(target: RunTarget) -> None:
    """Check that what `latest` and `best` name verifies."""
    remote = RemoteCheckpoints(Connection(target.client.tracking_uri), target.run_id, Path("cache"))
    for tag in {LATEST_TAG, BEST_TAG} & remote.tags.keys():
        manifest = remote.tagged(tag)
        remote.fetch(manifest.path, manifest)


def test_names_of_attempts() -> None:
    name = attempt_name(checkpoint_name(200, "bnps-"), 3, "0123456789abcdef" * 4)
    assert name == "3-0123456789ab~bnps-checkpoint-000200.pth.tar"
    assert parse_name(name) == (200, "bnps-", 3)
    assert (local_name(name), attempt_prefix(name)) == ("bnps-checkpoint-000200.pth.tar", "3-0123456789ab~")
    plain, *others = "checkpoint-000200.pth.tar", *(f"{n}-0123456789ab~checkpoint-000200.pth.tar" for n in (2, 10))
    assert newest_first([plain, *others]) == [others[1], others[0], plain]
    assert local_name(plain) == plain
    with pytest.raises(ConfigError):
        checkpoint_name(1, "2-0123456789ab~")  # no tag looks like an attempt


def test_other_bytes_get_another_name(target: RunTarget) -> None:
    first = commit(target, 1.0, val_top1=0.9)
    second = commit(target, 2.0, val_top1=0.5)
    name = attempt_name(PLAIN, 2, second.sha256)
    assert listed(target) == {PLAIN: first.sha256, name: second.sha256}
    assert tagged(target, LATEST_TAG) == second.named(name)
    assert tagged(target, BEST_TAG) == first  # never a lower accuracy
    check_tags(target)
    for which, value in (("latest", 2.0), ("2", 2.0), ("best", 1.0)):
        found = resolve(f"{target.run_id}@{which}", tracking_uri=target.client.tracking_uri, cache_dir="cache")
        assert found.path.name == PLAIN
        assert read_checkpoint(found.path)["state_dict"]["w"][0] == value
        assert read_manifest(found.path) == (second if value == 2.0 else first)


def test_the_same_bytes_are_committed_once(target: RunTarget) -> None:
    commit(target, 1.0)
    second = commit(target, 2.0)
    before = listed(target)
    Checkpoint.of(second, again=True).send(target)
    assert listed(target) == before


def test_an_earlier_attempt_does_not_become_the_latest_again(target: RunTarget) -> None:
    first = commit(target, 1.0)
    kept = Path("models", PLAIN).read_bytes()
    second = commit(target, 2.0)
    Path("models", PLAIN).write_bytes(kept)
    Checkpoint.of(first, again=True).send(target)
    assert tagged(target, LATEST_TAG).sha256 == second.sha256


@pytest.mark.parametrize("step", ["upload", "write_manifest"])
def test_an_upload_that_was_cut_short(
    target: RunTarget, client: MlflowClient, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves what the tags name; half an upload is overwritten, or collected."""
    commit(target, 1.0, val_top1=0.9)

    def fail(*_arguments: object) -> None:
        raise TrackingError("cut short", code="upload-not-listed")

    with monkeypatch.context() as patch, pytest.raises(TrackingError, match="cut short"):
        if step == "upload":  # the file has arrived, unconfirmed
            patch.setattr(RunArtifacts, "_local_folder", fail)
        else:
            patch.setattr(RunArtifacts, step, fail)
        commit(target, 2.0, val_top1=0.5)
    check_tags(target)
    third = commit(target, 3.0, val_top1=0.6)
    assert tagged(target, LATEST_TAG) == third.named(attempt_name(PLAIN, 3, third.sha256))
    assert len(listed(target)) == 3
    prune_run(target, Retention())
    assert set(listed(target)) == {PLAIN, attempt_name(PLAIN, 3, third.sha256)}
    check_tags(target)


def test_half_an_upload_under_the_plain_name_is_overwritten(target: RunTarget, client: MlflowClient) -> None:
    Path("half").mkdir()
    Path("half", PLAIN).write_bytes(b"half")
    client.log_artifact(target.run_id, str(Path("half", PLAIN)), "checkpoints")
    manifest = commit(target, 1.0)
    assert listed(target) == {PLAIN: manifest.sha256}


def test_a_name_that_is_being_deleted_is_not_taken(target: RunTarget, client: MlflowClient) -> None:
    client.set_tag(target.run_id, DELETING_TAG, json.dumps([PLAIN]))
    manifest = commit(target, 1.0)
    assert listed(target) == {attempt_name(PLAIN, 2, manifest.sha256): manifest.sha256}


def test_superseded_attempts_are_deleted_unless_something_names_them(target: RunTarget, client: MlflowClient) -> None:
    commit(target, 1.0, iters=1)
    commit(target, 1.0, val_top1=0.9)
    commit(target, 2.0, val_top1=0.5)
    promoted = tagged(target, LATEST_TAG).file_name
    client.create_registered_model("pets")
    client.create_model_version("pets", f"runs:/{target.run_id}/checkpoints/{promoted}", target.run_id)
    commit(target, 3.0, val_top1=0.6)
    last = commit(target, 4.0, val_top1=0.7)
    dropped = prune_run(target, Retention())
    assert [parse_name(item.manifest.file_name) for item in dropped] == [(2, "", 3)]
    newest = attempt_name(PLAIN, 4, last.sha256)
    assert set(listed(target)) == {"checkpoint-000001.pth.tar", PLAIN, promoted, newest}
    commit(target, 5.0, iters=3, val_top1=1.0)  # the plain name is no longer the best
    prune_run(target, Retention())
    assert PLAIN not in listed(target)
    assert Path("models", PLAIN).exists()
    check_tags(target)


def test_retention_drops_a_later_attempt_on_the_disk_too(target: RunTarget) -> None:
    commit(target, 1.0)
    commit(target, 2.0)
    for iters in (3, 4):
        commit(target, 0.0, iters)
    prune_run(target, Retention(keep_last=2))
    assert set(listed(target)) == {"checkpoint-000003.pth.tar", "checkpoint-000004.pth.tar"}
    assert not Path("models", PLAIN).exists()


def test_saving_one_iteration_again_and_again_keeps_one(target: RunTarget) -> None:
    for value in range(3):
        save_checkpoint({"state_dict": {"w": torch.full((3,), float(value))}}, 2, run_id=target.run_id)
    assert len(listed(target)) == 1
    check_tags(target)


def test_commands_tell_attempts_apart(target: RunTarget, shufflenet: Invoke, client: MlflowClient) -> None:
    commit(target, 1.0, val_top1=0.9)
    second = commit(target, 2.0, val_top1=0.5)

    def read(*words: object) -> object:
        result = shufflenet(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    journal = Journal(Path("models"))
    journal.set_owner(target.run_id, client.tracking_uri)
    journal.close()
    remember_store(client.tracking_uri)
    rows = read("checkpoints", "ls", "models")
    assert isinstance(rows, list)
    assert [(row["file"], row["local"], row["remote"], row["latest"], row["best"]) for row in rows] == [
        (PLAIN, True, True, True, False),
        (PLAIN, False, True, False, True),
    ]
    in_run = read("checkpoints", "ls", target.run_id)
    assert isinstance(in_run, list)
    assert [(row["file"], row["latest"]) for row in in_run] == [
        (attempt_name(PLAIN, 2, second.sha256), True),
        (PLAIN, False),
    ]
    assert isinstance(verdicts := read("checkpoints", "verify", target.run_id), list)
    assert [verdict["ok"] for verdict in verdicts] == [True, True]
    read("checkpoints", "pull", f"{target.run_id}@latest", "--output", "pulled")
    assert read_manifest(Path("pulled", PLAIN)) == second
