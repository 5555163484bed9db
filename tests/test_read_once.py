"""A checkpoint is verified and loaded once, and its run is read once, whatever a command does with them."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints import verification
from shufflenet_mlflow.errors import CorruptCheckpointError
from tests.support.command_line import Invoke


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often files are verified and loaded, stores connected to, and runs read."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counted[label] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    count(verification, "_verify", "verified")
    count(torch, "load", "loaded")
    count(MlflowClient, "__init__", "connected")
    count(MlflowClient, "get_run", "run read")
    return counted


Train = Callable[..., dict[str, Any]]


def test_resuming_a_run_in_its_folder(small_train: Train, counts: Counter[str]) -> None:
    run_id = small_train("--save-dir", "saved")["run_id"]
    counts.clear()
    small_train("--resume", run_id, "--save-dir", "saved")
    assert (counts["verified"], counts["loaded"]) == (1, 1)


def test_resuming_a_run_elsewhere(small_train: Train, tmp_path: Path, counts: Counter[str]) -> None:
    run_id = small_train("--save-dir", "saved")["run_id"]
    counts.clear()
    small_train("--resume", run_id, "--save-dir", "elsewhere", "--cache-dir", tmp_path)
    assert (counts["verified"], counts["loaded"]) == (1, 1)


def test_resuming_what_lies_in_a_folder(small_train: Train, counts: Counter[str]) -> None:
    small_train("--save-dir", "saved")
    counts.clear()
    small_train("--save-dir", "saved")
    assert (counts["verified"], counts["loaded"]) == (1, 1)


@pytest.mark.parametrize("log_to", ["source", "none"])
def test_evaluating_a_run(
    log_to: str, small_train: Train, shufflenet: Invoke, tmp_path: Path, counts: Counter[str]
) -> None:
    run_id = small_train("--save-dir", "saved")["run_id"]
    counts.clear()
    result = shufflenet("eval", run_id, "--cache-dir", tmp_path, "--log-to", log_to)
    assert result.exit_code == 0, result.output
    assert (counts["verified"], counts["loaded"], counts["connected"]) == (1, 1, 1)
    counts.clear()
    shufflenet("eval", run_id, "--cache-dir", tmp_path, "--log-to", "none")  # from the cache
    assert (counts["verified"], counts["loaded"], counts["connected"], counts["run read"]) == (1, 1, 1, 1)


@pytest.fixture
def saved(small_train: Train) -> Path:
    """A checkpoint file."""
    small_train("--save-dir", "saved")
    return Path("saved/bnps-checkpoint-000012.pth.tar")


def flip_a_byte(path: Path) -> None:
    """Change the file in place, and set its time of modification back."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(status.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_is_replaced_after_its_verification_is_verified_again(saved: Path) -> None:
    checkpoint = verification.open_checkpoint(saved)
    damaged = Path("damaged")
    shutil.copy2(saved, damaged)
    flip_a_byte(damaged)
    damaged.replace(saved)
    with pytest.raises(CorruptCheckpointError):
        checkpoint.read()


def test_a_file_that_is_written_to_after_its_verification_is_verified_again(saved: Path) -> None:
    checkpoint = verification.open_checkpoint(saved)
    flip_a_byte(saved)
    with pytest.raises(CorruptCheckpointError):
        checkpoint.read()


def test_a_renamed_file_stays_verified(saved: Path, counts: Counter[str]) -> None:
    checkpoint = verification.open_checkpoint(saved)
    checkpoint.rename(saved.with_name("renamed"))
    checkpoint.read()
    assert counts["verified"] == 1
    checkpoint = verification.open_checkpoint(checkpoint.path)
    flip_a_byte(checkpoint.path)
    checkpoint.rename(saved)
    with pytest.raises(CorruptCheckpointError):
        checkpoint.read()


def test_a_file_that_is_written_to_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.load

    def load_and_damage(*arguments: Any, **named: Any) -> Any:
        payload = load(*arguments, **named)
        flip_a_byte(saved)
        return payload

    monkeypatch.setattr(torch, "load", load_and_damage)
    with pytest.raises(CorruptCheckpointError, match="was written to while it was read; try again once nothing"):
        verification.read_checkpoint(saved)
