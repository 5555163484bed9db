"""All guarantees at once: runs that are killed, resumed and synced while everything around them goes wrong.

`make soak` does the same for an hour.
"""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.support.effort import repetitions
from tests.support.soak import Expected, Soak, Subject

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(2400)]

SEED = 17


def test_every_run_ends_whole_once_and_verified(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=SEED, minutes=repetitions(full=5, ci=2))
    assert not soak.run()
    assert any(outcome.sent for subject in soak.subjects for outcome in subject.outcomes), "nothing was killed"


def test_the_soak_finds_what_must_not_be(tmp_path: Path) -> None:
    """Negative control: each defect of a run that was tampered with is named."""
    soak = Soak(tmp_path, seed=SEED, minutes=0)
    expected = soak.undisturbed()
    store = tmp_path / "undisturbed-0"
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("soak").experiment_id])
    subject = Subject("subject", tmp_path)
    soak.check(subject, client, [run], expected)
    assert not soak.problems
    client.log_metric(run.info.run_id, "train/loss", 0.5, step=4)
    client.log_metric(run.info.run_id, "val/top1", 0.5, step=1)
    client.set_terminated(run.info.run_id, "FAILED")
    client.set_tag(run.info.run_id, "checkpoint.latest", json.dumps({"iters": 20}))
    for path in store.glob("mlruns/*/*/artifacts/checkpoints/*.pth.tar"):
        path.write_bytes(path.read_bytes()[:-1])
    changed = {name: torch.ones_like(value) for name, value in expected.weights.items()}
    soak.check(subject, client, [client.get_run(run.info.run_id)], Expected(expected.metrics, changed))
    soak.check(subject, client, [run, run], expected)
    found = "\n".join(soak.problems)
    for defect in ("FAILED", "train/loss has points twice: [4]", "has also [1]", "latest is", "not verified", "2 runs"):
        assert defect in found
