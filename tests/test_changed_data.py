"""Resuming compares the images' content with what the run began with, of both sets, wherever they lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data import listing
from shufflenet_mlflow.data.digits import cached_digits
from shufflenet_mlflow.data.mean import write_mean_image
from shufflenet_mlflow.errors import DataError, ResumeError
from shufflenet_mlflow.models import shufflenet_v2_large
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows.train import run_training
from shufflenet_mlflow.workflows.training.request import TrainRequest
from tests.support.command_line import Invoke
from tests.support.training import Reporter, run, run_until


def write_same_size(folder: Path, per_class: int) -> None:
    """Write images of equal size in bytes, whose content differs."""
    for label, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.random.default_rng([label, number]).integers(0, 250, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.bmp")


def swap(folder: Path, first: str, second: str, count: int) -> None:
    for number in range(count):
        one, other = folder / first / f"{number:03}.bmp", folder / second / f"{number:03}.bmp"
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write_same_size(tmp_path / "mine/train", 12)
    write_same_size(tmp_path / "mine/val", 5)
    return tmp_path / "mine"


def folders(root: Path) -> list[object]:
    return ["--train-dir", root / "train", "--val-dir", root / "val"]


def test_files_of_equal_size_swapped_between_classes(images: Path, mine: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, *folders(mine), "--save-dir", "models")
    swap(mine / "train", "blue", "green", 9)
    message = r"--train-dir '.*train' does not hold .* files changed in content in class 'blue', 'green'; put them back"
    with pytest.raises(ResumeError, match=message) as refused:
        run(images, *folders(mine), "--save-dir", "models")
    assert refused.value.code == "train-images-changed"
    assert client.get_run(stopped.run_id).info.status == "KILLED"
    with pytest.raises(ResumeError, match=message):  # on another machine, by the run's ID alone
        run(images, "--resume", stopped.run_id, *folders(mine), "--save-dir", "elsewhere")
    fork = run(images, "--resume", stopped.run_id, *folders(mine), "--save-dir", "fork", "--new-run")
    assert "train_images" in json.loads(client.get_run(fork.run_id).data.tags["drift.6"])
    taken = run(images, *folders(mine), "--save-dir", "models", "--changed-data")
    assert taken.run_id == stopped.run_id
    then, now = json.loads(client.get_run(taken.run_id).data.tags["drift.6"])["train_images"]
    assert then != now
    assert taken.result.checkpoint is not None
    assert read_checkpoint(taken.result.checkpoint)["data"]["train_content_digest"] == now


def test_a_validation_class_that_shrank(images: Path, mine: Path) -> None:
    run_until(images, "training", 6, *folders(mine), "--save-dir", "models")
    for number in range(4):
        (mine / f"val/red/{number:03}.bmp").unlink()
    with pytest.raises(ResumeError, match=r"--val-dir .* 4 files removed in class 'red' \(5 -> 1 images\)") as refused:
        run(images, *folders(mine), "--save-dir", "models")
    assert refused.value.code == "val-images-changed"
    assert run(images, *folders(mine), "--save-dir", "models", "--changed-data").result.iters == 12


def test_the_number_of_training_images_may_change(images: Path, mine: Path) -> None:
    run_until(images, "training", 6, *folders(mine), "--save-dir", "models")
    for number in range(11):
        (mine / f"train/red/{number:03}.bmp").unlink()
    reporter = Reporter()
    assert run(images, *folders(mine), "--save-dir", "models", "--changed-data", reporter=reporter).result.iters == 12
    assert any("11 files removed" in warning for warning in reporter.warnings)


def test_another_mean_image(images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shufflenet_v2_large, "STAGE_UNITS", (1, 1, 1, 1))
    monkeypatch.setattr(shufflenet_v2_large, "STAGE_WIDTHS", (32, 16, 16, 16))
    monkeypatch.setattr(shufflenet_v2_large, "LAST_WIDTH", 64)
    for level in (100, 120):
        write_mean_image(Path(f"{level}.npy"), np.full((32, 32, 3), level, dtype=np.float32))
    words = ["--model", "shufflenet_v2_large", "--lr", 0.0001, "--total-iters", 4, "--save-dir", "models"]
    run_until(images, "training", 2, *words, "--mean-image", "100.npy")
    with pytest.raises(ResumeError, match="--mean-image is not the one that the run began with") as refused:
        run(images, *words, "--mean-image", "120.npy")
    assert refused.value.code == "mean-image-changed"
    taken = run(images, *words, "--mean-image", "120.npy", "--changed-data")
    assert "mean_image_content" in json.loads(client.get_run(str(taken.run_id)).data.tags["drift.2"])
    assert taken.result.checkpoint is not None
    assert read_checkpoint(taken.result.checkpoint)["preprocess"]["mean_image"].unique().tolist() == [120.0]


def test_the_same_content_in_another_place_is_the_same(images: Path, mine: Path, tmp_path: Path) -> None:
    stopped = run_until(images, "training", 6, *folders(mine), "--save-dir", "models")
    shutil.copytree(mine, tmp_path / "copy")
    shutil.rmtree(mine)
    resumed = run(images, "--resume", stopped.run_id, *folders(tmp_path / "copy"), "--save-dir", "elsewhere")
    assert resumed.run_id == stopped.run_id


def test_of_a_large_set_names_and_sizes_are_compared(images: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "CONTENT_UP_TO", 1000)
    run_until(images, "training", 6, *folders(mine), "--save-dir", "models")
    swap(mine / "train", "blue", "green", 9)  # unseen, as documented
    shutil.copytree("models", "before")
    assert run(images, *folders(mine), "--save-dir", "models").result.iters == 12
    (mine / "train/blue/000.bmp").rename(mine / "train/blue/a.bmp")
    with pytest.raises(ResumeError, match="files renamed or of another size"):
        run(images, *folders(mine), "--save-dir", "models")


@pytest.mark.parametrize("known", [{}, {"train_digest": None, "val_digest": None}])
def test_a_checkpoint_without_digests_resumes_and_says_so(known: dict[str, Any], images: Path, mine: Path) -> None:
    stopped = run_until(images, "training", 6, *folders(mine), "--save-dir", "models")
    payload = read_checkpoint(stopped.save_dir / "checkpoint-000006.pth.tar")
    Path("old").mkdir()
    torch.save({**payload, "data": known}, "old/checkpoint-000006.pth.tar")
    swap(mine / "train", "blue", "green", 9)
    reporter = Reporter()
    run(images, "--resume", "old", *folders(mine), "--save-dir", "old", reporter=reporter)
    assert "the checkpoint does not say which training and validation images it was trained with" in reporter.notes


@pytest.mark.long
def test_the_bundled_digits(tmp_path: Path) -> None:
    """Their cache is a folder like any other."""
    given = {"input_size": 32, "batch_size": 8, "total_iters": 3, "val_interval": 9, "save_interval": 2}
    request = TrainRequest(given, cache_dir=tmp_path, save_dir=Path("models"), no_log_models=True)
    run_training(request, reporter=Reporter(), stop=StopFlag())
    first, second = sorted((cached_digits(tmp_path) / "val/3").glob("*.png"))[:2]
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    with pytest.raises(ResumeError, match="--val-dir .* files changed in content in class '3'"):
        run_training(request, reporter=Reporter(), stop=StopFlag())


def test_a_new_class_names_the_way_to_train_on_it(images: Path, mine: Path, shufflenet: Invoke) -> None:
    begun = run(images, *folders(mine), "--save-dir", "models", "--total-iters", 2)
    for part in ("train", "val"):
        shutil.copytree(mine / part / "red", mine / part / "white")
    words = ("--num-classes", 4), ("--changed-data",), ("--new-run", "--save-dir", "fork"), ()
    for more in words:
        with pytest.raises(
            DataError, match=f"it also has 'white'; `shufflenet train --init-from runs:/{begun.run_id}`"
        ):
            run(images, "--resume", begun.run_id, *folders(mine), *more)
    evaluated = shufflenet("eval", begun.run_id)
    assert evaluated.exit_code == 1
    assert "no longer holds the run's val images: class 'white' added" in evaluated.stderr
    assert "Error: the run's folder" in evaluated.stderr
    assert evaluated.stderr.rstrip().endswith("it also has 'white'; --val-dir names a folder with these classes")
    grown = run(images, "--init-from", f"runs:/{begun.run_id}", *folders(mine), "--save-dir", "grown")
    assert len(read_checkpoint(grown.result.checkpoint)["class_to_idx"]) == 4
