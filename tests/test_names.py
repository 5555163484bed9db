"""Names of folders and files beyond ASCII, and files that are passed over."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.folder import list_images
from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images
from tests.support.training import run

COMPOSED, DECOMPOSED = "K\u00e4tzchen", "Ka\u0308tzchen"
CLASSES = (COMPOSED, "Kz", "Z")
"""Their order depends on the form: `Kz` comes before the one, and after the other."""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Write training images with composed and validation images with decomposed names."""
    write_images(tmp_path / "train", CLASSES)
    write_images(tmp_path / "val", (DECOMPOSED, *CLASSES[1:]), per_class=5, seed=1)
    for path in (tmp_path / "train").rglob("000.png"):
        path.rename(path.with_name("\u00e9.png"))
    return tmp_path


def in_form(form: str, source: Path, target: Path) -> Path:
    """Copy a folder as another system would, its names in another form of Unicode."""
    for path in source.rglob("*.png"):
        name = unicodedata.normalize(form, path.relative_to(source).as_posix())  # type: ignore[arg-type]
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / name)
    return target


def test_names_in_two_forms_are_the_same_classes(folders: Path, shufflenet: Invoke) -> None:
    """Validation, evaluation elsewhere and resuming elsewhere find the class with its label."""
    trained = run(folders, "--save-dir", "models", "--total-iters", 6)
    payload = read_checkpoint(trained.result.checkpoint)
    assert payload["class_to_idx"] == list_images(folders / "train").class_to_idx == {"Kz": 0, COMPOSED: 1, "Z": 2}
    moved = in_form("NFD", folders / "train", folders / "elsewhere" / "train")
    in_form("NFC", folders / "val", folders / "elsewhere" / "val")
    accuracies = [
        json.loads(shufflenet("eval", trained.result.checkpoint, "--val-dir", folder, "--json").stdout)["top1"]
        for folder in (folders / "val", folders / "elsewhere" / "val")
    ]
    assert accuracies == [trained.result.val_top1] * 2
    shutil.copytree("models", "moved")
    assert list_images(moved).digest != payload["data"]["train_digest"]
    there = run(folders / "elsewhere", "--save-dir", "moved", "--total-iters", 6)
    assert there.was_complete


def test_folders_that_differ_in_form_only_are_one_class(folders: Path) -> None:
    before = list_images(folders / "train")
    (folders / "train" / DECOMPOSED).mkdir()
    moved = sorted((folders / "train" / COMPOSED).iterdir())[0]
    moved.rename(folders / "train" / DECOMPOSED / moved.name)
    listing = list_images(folders / "train")
    assert (listing.class_to_idx, len(listing), listing.merged) == (before.class_to_idx, len(before), (COMPOSED,))
    assert listing.in_form("NFC").digest == before.in_form("NFC").digest
    trained = run(folders, "--total-iters", 2)
    assert trained.result.iters == 2


@pytest.mark.long
def test_a_locale_without_umlauts(folders: Path) -> None:
    """Good files are read, and classes are named, as anywhere else."""
    variables = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "shufflenet_mlflow"]
    trained = subprocess.run(
        [*command, "train", *map(str, small_options(folders)), "--total-iters", "2", "--save-dir", "models", "--json"],
        env=variables,
        capture_output=True,
        check=False,
    )
    assert trained.returncode == 0, trained.stderr.decode()[-2000:]
    checkpoint = json.loads(trained.stdout)["checkpoint"]
    assert read_checkpoint(checkpoint)["class_to_idx"] == {"Kz": 0, COMPOSED: 1, "Z": 2}
    predicted = subprocess.run(
        [*command, "predict", checkpoint, str(folders / "train" / COMPOSED), "--format", "csv"],
        env=variables,
        capture_output=True,
        check=False,
    )
    assert predicted.returncode == 0, predicted.stderr.decode()[-2000:]
    assert f"{COMPOSED}/\u00e9.png" in predicted.stdout.decode()


def test_what_is_left_out_is_counted(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    """By suffix, in one line, by every command that goes through a folder."""
    for part in ("train", "val"):
        shutil.copytree(images / part, tmp_path / part)
        for name in ("a.mp4", "b.MP4", "notes.txt"):
            (tmp_path / part / "red" / name).touch()
    (tmp_path / "val" / "README").touch()
    line = "left out 3 files (2 .mp4, 1 .txt)"
    trained = shufflenet("train", *small_options(tmp_path), "--on-bad-image", "skip", "--save-dir", "models")
    assert f"--train-dir '{tmp_path}/train': {line}" in trained.stderr
    left_out = "left out 4 files (2 .mp4, 1 .txt, 1 without a suffix), 1 of them outside the class folders"
    assert left_out in trained.stderr
    assert left_out in shufflenet("eval", "models").stderr
    assert line in shufflenet("predict", "models", tmp_path / "train", "--format", "csv").stderr
    assert line in shufflenet("data", "mean", tmp_path / "train", "--on-bad-image", "skip").stderr


def test_evaluation_skips_what_the_run_skipped(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    """The command that `train` suggests works as printed; --on-bad-image fail is still strict."""
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "red" / "000.png").write_bytes(b"nothing")
    trained = shufflenet("train", *small_options(tmp_path), "--on-bad-image", "skip")
    (hint,) = (line for line in trained.stderr.splitlines() if "shufflenet eval" in line)
    result = shufflenet("eval", hint.split()[-1])
    assert result.exit_code == 0, result.output
    assert "1 unreadable skipped" in result.stdout
    assert shufflenet("eval", hint.split()[-1], "--on-bad-image", "fail").exit_code == 1


def test_rows_before_a_broken_image_are_printed(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    run(images, "--save-dir", "models", "--total-iters", 2)
    shutil.copytree(images / "val" / "red", tmp_path / "red")
    (tmp_path / "red" / "003.png").write_bytes(b"nothing")
    result = shufflenet("predict", "models", tmp_path / "red", "--format", "csv")
    assert result.exit_code == 1
    rows = result.stdout.splitlines()
    assert rows[0].startswith("path,label,probability")
    assert [row.split(",")[0][-7:] for row in rows[1:]] == ["000.png", "001.png", "002.png"]
