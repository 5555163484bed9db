"""Retention policies: which checkpoints they keep, and that only the others are deleted, on disk and in the run."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.checkpoints.folders import delete_checkpoint, list_checkpoints, remove_leftovers
from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest, manifest_path
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.errors import UnresolvedError
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.names import DELETING_TAG, MODEL_VERSION_TAG
from shufflenet_mlflow.tracking.prune import prune_run
from shufflenet_mlflow.tracking.resolve import resolve
from shufflenet_mlflow.tracking.target import RunTarget


def manifests(*iters: int, top1: dict[int, float | None] | None = None) -> list[CheckpointManifest]:
    return [
        CheckpointManifest(f"checkpoints/checkpoint-{n:06}.pth.tar", n, 0, 0.0, (top1 or {}).get(n), "0" * 64, 1)
        for n in iters
    ]


def dropped(rules: Retention, found: list[CheckpointManifest], protected: tuple[str, ...] = ()) -> list[int]:
    return [manifest.iters for manifest in rules.drop(found, protected)]


@pytest.mark.parametrize(
    ("rules", "dropped_iters"),
    [
        (Retention(), []),
        (Retention(keep_last=2), [1, 2, 3]),
        (Retention(keep_last=9), []),
        (Retention(keep_every=2), [1, 3]),
        (Retention(keep_every=4, keep_last=1), [1, 2, 3]),
        (Retention(keep_best=1), [1, 2, 3, 4]),
    ],
)
def test_rules_without_validation(rules: Retention, dropped_iters: list[int]) -> None:
    assert dropped(rules, manifests(1, 2, 3, 4, 5)) == dropped_iters
    assert dropped(rules, manifests(5, 3, 1, 2, 4)) == dropped_iters  # in whatever order they are listed


def test_the_best_are_kept() -> None:
    top1 = {1: 0.1, 2: 0.9, 3: 0.5, 4: float("nan"), 5: None, 6: 0.2}
    found = manifests(1, 2, 3, 4, 5, 6, 7, top1=top1)
    assert dropped(Retention(keep_last=1), found) == [1, 3, 4, 5, 6]
    assert dropped(Retention(keep_best=2), found) == [1, 4, 5, 6]
    assert dropped(Retention(keep_best=9), found) == [4, 5]
    assert dropped(Retention(keep_last=2, keep_every=5), found) == [1, 3, 4]


def test_the_first_of_equal_accuracies_is_best() -> None:
    assert dropped(Retention(keep_best=1), manifests(1, 2, 3, top1={1: 0.5, 2: 0.5})) == [2]


def test_protected_checkpoints_are_kept() -> None:
    assert dropped(Retention(keep_last=1), manifests(1, 2, 3), ("checkpoint-000001.pth.tar",)) == [2]


def test_the_reestimated_state_is_newer_than_the_one_before() -> None:
    final = CheckpointManifest("checkpoints/bnps-checkpoint-000003.pth.tar", 3, 0, 0.0, None, "0" * 64, 1)
    assert [manifest.file_name for manifest in Retention(keep_last=1).drop([*manifests(2, 3), final])] == [
        "checkpoint-000002.pth.tar",
        "checkpoint-000003.pth.tar",
    ]


# ---------------------------------------------------------------- deleting


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    """Save five checkpoints in ./models and in a run; the third is the best."""
    run = client.create_run(client.create_experiment("retention"))
    for iters in range(1, 6):
        state = {"state_dict": {"w": torch.full((3,), float(iters))}}
        save_checkpoint(state, iters, val_top1=0.9 if iters == 3 else 0.1, run_id=run.info.run_id, directory="models")
    return str(run.info.run_id)


def target(client: MlflowClient, run_id: str) -> RunTarget:
    return RunTarget(client, run_id, Path("models"))


def on_disk() -> list[int]:
    return sorted(int(path.name[11:17]) for path in list_checkpoints(Path("models")))


def in_run(client: MlflowClient, run_id: str) -> list[int]:
    artifacts = RunArtifacts(client, run_id)
    found = sorted(manifest.iters for manifest in artifacts.manifests())
    assert len(artifacts.sizes()) == 2 * len(found)
    return found


def test_it_deletes_on_disk_and_in_the_run(client: MlflowClient, run_id: str) -> None:
    dropped = prune_run(target(client, run_id), Retention(keep_last=2))
    assert [item.manifest.iters for item in dropped] == [1, 2]
    assert on_disk() == in_run(client, run_id) == [3, 4, 5]
    assert DELETING_TAG not in client.get_run(run_id).data.tags


def test_promoted_checkpoints_are_kept(client: MlflowClient, run_id: str) -> None:
    client.create_registered_model("pets")
    client.create_model_version("pets", f"runs:/{run_id}/checkpoints/checkpoint-000002.pth.tar", run_id)
    prune_run(target(client, run_id), Retention(keep_last=1))
    assert on_disk() == in_run(client, run_id) == [2, 3, 5]


def test_checkpoints_of_logged_models_that_were_registered_elsewhere_are_kept(
    client: MlflowClient, run_id: str
) -> None:
    """MLflow's UI registers a logged model without the tag of `checkpoints promote`."""
    [second] = [found for found in RunArtifacts(client, run_id).manifests() if found.iters == 2]
    model = client.create_logged_model(
        client.get_run(run_id).info.experiment_id, source_run_id=run_id, tags={MODEL_VERSION_TAG: second.to_json()}
    )
    client.create_registered_model("pets")
    client.create_model_version("pets", f"models:/{model.model_id}", run_id)
    prune_run(target(client, run_id), Retention(keep_last=1))
    assert on_disk() == in_run(client, run_id) == [2, 3, 5]


def test_foreign_files_are_kept(client: MlflowClient, run_id: str) -> None:
    manifest_path(Path("models/checkpoint-000001.pth.tar")).unlink()
    other = save_checkpoint({"state_dict": {"w": torch.zeros(7)}}, 0, directory="models")  # of no run
    Path("models/checkpoint-000002.pth.tar").write_bytes(other.read_bytes())
    Path("models/checkpoint-000002.pth.tar.json").write_bytes(manifest_path(other).read_bytes())
    prune_run(target(client, run_id), Retention(keep_last=1))
    assert on_disk() == [0, 1, 2, 3, 5]
    assert in_run(client, run_id) == [3, 5]


def test_the_newest_valid_checkpoint_is_kept(client: MlflowClient, run_id: str) -> None:
    path = Path("models/checkpoint-000005.pth.tar")
    path.write_bytes(path.read_bytes()[:-1])
    prune_run(target(client, run_id), Retention(keep_last=1))
    assert on_disk() == [3, 4, 5]  # the best, the newest that verifies, the newest


def test_a_deletion_that_was_cut_short_is_completed(client: MlflowClient, run_id: str) -> None:
    names = ["checkpoint-000001.pth.tar", "checkpoint-000002.pth.tar", "checkpoint-000005.pth.tar"]
    client.set_tag(run_id, DELETING_TAG, json.dumps(names))
    with pytest.raises(UnresolvedError, match="no checkpoint at iteration 1; it has: 3, 4"):
        resolve(f"{run_id}@1")  # from the first phase on, nobody reads it
    prune_run(target(client, run_id), Retention(keep_last=5))
    assert on_disk() == in_run(client, run_id) == [3, 4, 5]  # the latest has been written again since
    assert DELETING_TAG not in client.get_run(run_id).data.tags


def test_two_phases_on_the_disk(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is killed between them, the file has lost its name, and the next start removes the rest."""
    path = Path("models/checkpoint-000001.pth.tar")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def die(_path: Path, missing_ok: bool = False) -> None:
            raise KeyboardInterrupt

        patch.setattr(Path, "unlink", die)
        delete_checkpoint(path)
    assert on_disk() == [2, 3, 4, 5]
    assert manifest_path(path).exists()
    remove_leftovers(Path("models"))
    assert not manifest_path(path).exists()
    assert len(list(Path("models").glob("checkpoint-*"))) == 8
