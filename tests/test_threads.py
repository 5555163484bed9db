"""Threads: how many a run computes with, on which its last bits depend, and which processors round alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.runtime import devices, threads
from shufflenet_mlflow.runtime.devices import processor
from shufflenet_mlflow.runtime.threads import MACS_PER_THREAD, default_threads
from shufflenet_mlflow.workflows.training import config as config_module
from shufflenet_mlflow.workflows.training import description
from tests.support.payloads import assert_equal_payloads
from tests.support.training import Reporter, run, run_until


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("work", "cores", "processes", "expected"),
    [(0.01, 8, 1, 1), (3, 8, 1, 3), (100, 8, 1, 8), (100, 8, 4, 2), (100, 1, 2, 1)],
)
def test_no_more_threads_than_have_work(
    work: float, cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_threads(work * MACS_PER_THREAD) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # PyTorch has read it, and the user who set it knows better
    torch.set_num_threads(3)
    assert default_threads(work * MACS_PER_THREAD) == 3


def last(summary: Any) -> dict[str, Any]:
    assert summary.checkpoint is not None
    return read_checkpoint(summary.checkpoint)


def test_a_run_keeps_its_threads(images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    uninterrupted = last(run(images, "--threads", 2))
    assert uninterrupted["config"]["threads"] == uninterrupted["environment"]["threads"] == 2
    assert torch.get_num_threads() == before
    used = set()
    stopped = run_until(
        images, "training", 5, "--threads", 2, on_progress=lambda name, _: used.add((name, torch.get_num_threads()))
    )
    assert {count for name, count in used if name == "training"} == {2}
    monkeypatch.setattr(config_module, "default_threads", lambda _macs: 1)  # as on a machine with one core
    reporter = Reporter()
    resumed = last(run(images, "--resume", stopped.run_id, reporter=reporter))
    assert not [note for note in reporter.notes if "up to rounding" in note]
    for name in ("state_dict", "optimizer_state_dict"):
        assert_equal_payloads(resumed[name], uninterrupted[name])


def test_other_threads_and_another_processor_are_said(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = run_until(images, "training", 5, "--threads", 1)
    monkeypatch.setattr(description, "processor", lambda: "GenuineIntel 6 143")
    reporter = Reporter()
    run(images, "--resume", stopped.run_id, "--threads", 2, reporter=reporter)
    [note] = [note for note in reporter.notes if "up to rounding" in note]
    assert f"processor ({processor()} -> GenuineIntel 6 143), threads (1 -> 2)" in note


def test_the_kind_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    first = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    cpuinfo.write_text(f"{first}\nprocessor\t: 1\nmodel\t: 99\n")
    monkeypatch.setattr(devices, "_CPUINFO", cpuinfo)
    assert processor() == "AuthenticAMD 25 17"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    assert processor() == "0x41 0xd0c"
    cpuinfo.unlink()
    assert processor()  # what Python says


def test_fewer_images_for_batch_normalisation(images: Path, client: MlflowClient) -> None:
    done: dict[str, int] = {}
    reporter = Reporter(lambda name, count: done.update({name: count}))
    whole, part = last(run(images)), last(run(images, "--bn-images", 5, reporter=reporter))
    assert done["re-estimating BN"] == 1  # one batch instead of an epoch's two
    statistics = {name for name in whole["state_dict"] if "running_" in name}
    differing = {
        name for name, tensor in whole["state_dict"].items() if not torch.equal(tensor, part["state_dict"][name])
    }
    assert statistics & differing
    assert all("running_" in name or "num_batches" in name for name in differing)
