"""Random bit flips and truncations of a checkpoint, its manifest and the journal: a thousand of each in the full run.

Every one is detected, or changes nothing that is loaded or delivered.
"""

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints, newest_valid
from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest, manifest_path, read_manifest
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, read_pending
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
from shufflenet_mlflow.tracking.messages import MetricPoints, to_body
from shufflenet_mlflow.tracking.resolve import resolve
from tests.support.delivering import deliver_now
from tests.support.effort import only_in_full_run, repetitions
from tests.support.payloads import assert_equal_payloads
from tests.support.training import run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

TRIALS = repetitions(full=1000, ci=400)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Silence warnings: thousands say no more than the first."""
    caplog.set_level(logging.ERROR, "shufflenet_mlflow")


def damage(original: bytes, generator: random.Random) -> bytes:
    """Return the bytes with one flipped bit, or, one time in five, truncated."""
    damaged = bytearray(original)
    if generator.random() < 0.2:
        del damaged[generator.randrange(len(damaged)) :]
    else:
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


@pytest.fixture
def checkpoint(images: Path) -> Path:
    """Train a small run, and return its last checkpoint, beside older ones."""
    run(images, "--save-dir", "models")
    return list_checkpoints(Path("models"))[0]


@pytest.mark.parametrize("with_record", [True, False])
def test_checkpoints(with_record: bool, checkpoint: Path) -> None:
    original, payload = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    if not with_record:
        manifest_path(checkpoint).unlink()
    generator = random.Random(1)
    detected = fell_back = 0
    for trial in range(TRIALS):
        checkpoint.write_bytes(damage(original, generator))
        try:
            assert_equal_payloads(read_checkpoint(checkpoint), payload)
        except CheckpointError:
            detected += 1
            if trial % 50 == 0:  # and the folder still has its newest valid one
                found = newest_valid(checkpoint.parent)
                assert found is not None
                assert found.path.name == "checkpoint-000012.pth.tar"
                fell_back += 1
    assert detected == TRIALS if with_record else detected > 0.95 * TRIALS
    assert fell_back > TRIALS / 100


@only_in_full_run
def test_manifests(checkpoint: Path) -> None:
    """Neither figures nor digest of an altered manifest are used."""
    path, manifest = manifest_path(checkpoint), read_manifest(checkpoint)
    original, payload = path.read_bytes(), read_checkpoint(checkpoint)
    generator = random.Random(2)
    disbelieved = 0
    for _ in range(TRIALS):
        path.write_bytes(damage(original, generator))
        found = read_manifest(checkpoint)
        assert found in (manifest, None)
        disbelieved += found is None
        assert_equal_payloads(read_checkpoint(checkpoint), payload)
    assert disbelieved > 0.9 * TRIALS


def abandon(journal: Journal) -> None:
    """Release the journal as a killed process does, without closing it."""
    journal._lock.release()
    os.close(journal._descriptor)


def test_journals(tmp_path: Path) -> None:
    """Every entry read from a damaged journal was written to it."""
    journal = Journal(tmp_path)
    for step in range(40):
        message: Any = MetricPoints({"train/loss": step / 7}, step, 1_000 + step)
        journal.append("a" * 32, message.kind, to_body(message))
        if step % 10 == 0:
            manifest = CheckpointManifest(f"checkpoints/checkpoint-{step:06}.pth.tar", step, 1, 0.5, None, "0" * 64, 9)
            journal.append("a" * 32, "checkpoint", to_body(Checkpoint.of(manifest)))
    abandon(journal)
    path = tmp_path / JOURNAL_NAME
    original = path.read_bytes()
    entries = [(entry.run, entry.kind, entry.body) for entry in read_pending(tmp_path).entries]
    assert len(entries) == 44
    generator = random.Random(3)
    for _ in range(TRIALS):
        damaged = damage(original, generator)
        path.write_bytes(damaged)
        reopened = Journal(tmp_path)
        found = [(entry.run, entry.kind, entry.body) for entry in reopened.oldest(99)]
        abandon(reopened)
        remaining = iter(entries)
        assert all(entry in remaining for entry in found), "altered, or out of order"
        if len(damaged) == len(original) and found != entries:
            # A last line without its end is what a killed writer leaves: that is no damage.
            assert reopened.was_damaged or found == entries[:-1]
            assert len(found) >= len(entries) - 2


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_journal_loses_no_checkpoint(seed: int, client: MlflowClient) -> None:
    """Checkpoints whose lines are lost are found on the disk."""
    from shufflenet_mlflow.runtime.progress import LoggingReporter
    from shufflenet_mlflow.runtime.signals import StopFlag
    from shufflenet_mlflow.workflows.sync import run_sync

    run_id = str(client.create_run(client.create_experiment("journal")).info.run_id)
    journal = Journal(Path("models"))
    journal.set_owner(run_id, client.tracking_uri)
    for iters in range(1, 6):
        state = {"state_dict": {"w": torch.full((9,), float(iters))}}
        manifest = write_checkpoint(state, iters, directory="models", val_top1=iters / 10).manifest
        journal.append(run_id, "checkpoint", to_body(Checkpoint.of(manifest)))
        if iters == 2:
            deliver_now(client, journal, TRACKING_KINDS)
    journal.close()
    path = Path("models") / JOURNAL_NAME
    head = path.read_bytes().index(b"\n") + 1  # the header names the run
    path.write_bytes(path.read_bytes()[:head] + damage(path.read_bytes()[head:], random.Random(seed)))
    run_sync(Path("models"), dry_run=False, tracking_uri=None, reporter=LoggingReporter(), stop=StopFlag())
    for iters in range(1, 6):
        found = resolve(f"{run_id}@{iters}")
        assert (read_checkpoint(found.path)["state_dict"]["w"] == iters).all()
    assert resolve(f"{run_id}@latest").iters == 5


def test_the_loops_above_can_fail(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without verification, `torch.load` takes flipped bits for weights."""
    from shufflenet_mlflow.checkpoints import verification as verify

    accept: Callable[..., None] = lambda *_arguments: None  # noqa: E731
    monkeypatch.setattr(verify, "_verify", accept)
    with pytest.raises(AssertionError):
        test_checkpoints(True, checkpoint)
