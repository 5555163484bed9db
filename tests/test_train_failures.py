"""Training that fails, and a store that fails during training."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from shufflenet_mlflow.checkpoints.folders import list_checkpoints, list_manifests
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import (
    BadImageError,
    ConfigError,
    DataError,
    NonFiniteLossError,
)
from shufflenet_mlflow.runtime.devices import lack_of_memory
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import delivery
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.training.meter import Meter
from shufflenet_mlflow.training.state import TrainingState
from tests.support.images import write_images
from tests.support.training import Reporter, assert_same_end, run

# ---------------------------------------------------------------- what goes wrong


def statuses(client: MlflowClient) -> list[str]:
    return [run.info.status for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]


def test_a_diverging_run_names_iteration_and_rate(images: Path, client: MlflowClient) -> None:
    with pytest.raises(
        NonFiniteLossError,
        match=r"NaN or infinite at iteration \d+, with a learning rate of [\d.e+]+; .* lower --lr; the last good",
    ):
        run(images, "--lr", 1e20, "--save-dir", "models", "--save-interval", 1, "--val-interval", 12)
    assert statuses(client) == ["FAILED"]
    [path] = list_checkpoints(Path("models"))
    payload = read_checkpoint(path)
    assert np.isfinite(payload["loss"])
    assert all(tensor.isfinite().all() for tensor in payload["state_dict"].values())


@pytest.mark.parametrize(("method", "kept"), [("fetch", 6), ("_autocast", 5)], ids=["between steps", "within a step"])
def test_memory_that_runs_out_is_one_line(
    method: str, kept: int, images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the seventh iteration, PyTorch is asked for more memory than any machine has.

    Between two steps the state is whole, and kept; within a step it is not, and the last checkpoint counts.
    """
    original = getattr(TrainingLoop, method)

    def too_large(trainer: TrainingLoop, *arguments: Any) -> Any:
        if trainer.state.iters == 6:
            torch.empty(1 << 55)
        return original(trainer, *arguments)

    monkeypatch.setattr(TrainingLoop, method, too_large)
    with pytest.raises(
        ConfigError, match="memory ran out .*allocate.*; lower --batch-size, --input-size, or --micro-b"
    ):
        run(images, "--save-dir", "models")
    assert statuses(client) == ["FAILED"]
    assert list_checkpoints(Path("models"))[0].name == f"checkpoint-{kept:06}.pth.tar"


def test_pytorchs_error_for_gpu_memory() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
    )
    assert "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB" in str(lack_of_memory(error))
    assert lack_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_the_meter_remembers_the_first_bad_iteration() -> None:
    meter = Meter(torch.device("cpu"))
    none, one = torch.tensor(0), torch.tensor(1)
    for iters, loss in enumerate((1.0, 3.0, float("nan"), 1.0, float("inf")), start=1):
        meter.update(iters, torch.tensor(loss), one, none, 2)
    assert meter.first_bad() == 3
    meter.reset()
    assert meter.first_bad() == 3


def test_nan_never_becomes_the_best() -> None:
    state = TrainingState.__new__(TrainingState)
    state.best, state.iters, state.validations_since_best = None, 5, 0
    assert not state.record_validation({"val/top1": float("nan")})
    assert state.record_validation({"val/top1": 0.2})
    assert not state.record_validation({"val/top1": float("nan")})
    assert not state.record_validation({"val/top1": 0.2})
    assert state.record_validation({"val/top1": 0.3})
    assert state.best == {"val_top1": 0.3, "iters": 5}


@pytest.fixture
def with_bad_file(tmp_path: Path) -> Path:
    """Copy the images and damage two: a training image is truncated, a validation image is text."""
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", per_class=5, seed=1)
    whole = (tmp_path / "train" / "red" / "004.png").read_bytes()
    (tmp_path / "train" / "red" / "004.png").write_bytes(whole[:200])
    (tmp_path / "val" / "blue" / "002.png").write_bytes(b"GIF89a no")
    return tmp_path


def test_a_bad_image_fails_the_run_and_loses_nothing(with_bad_file: Path, client: MlflowClient) -> None:
    truncated = (with_bad_file / "train" / "red" / "004.png").read_bytes()
    (with_bad_file / "val" / "blue" / "002.png").write_bytes(truncated)  # with a good header, as the other
    with pytest.raises(BadImageError, match=r"red/004.png' is not a readable image .*--on-bad-image skip"):
        run(with_bad_file, "--save-dir", "models")
    assert statuses(client) == ["FAILED"]
    assert [path.name for path in list_checkpoints(Path("models"))] == ["checkpoint-000003.pth.tar"]
    resumed = run(with_bad_file, "--save-dir", "models", "--on-bad-image", "skip")
    assert statuses(client) == ["FINISHED"]
    assert resumed.result.iters == 12
    assert client.get_run(resumed.run_id).data.metrics["data/unreadable_files"] == 2


def test_files_without_an_image_header_are_found_before_training(with_bad_file: Path, client: MlflowClient) -> None:
    """No run is begun; with skip they are counted, and the run goes on."""
    (with_bad_file / "val" / "red" / "001.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"val/blue/002.png' is not .* \(and 1 more file\); remove it or") as caught:
        run(with_bad_file, "--save-dir", "models")
    assert caught.value.code == "image-header-unreadable"
    assert statuses(client) == []
    reporter = Reporter()
    run(with_bad_file, "--on-bad-image", "skip", "--total-iters", 2, reporter=reporter)
    assert "2 files are not readable, and will be skipped" in reporter.warnings


@pytest.mark.parametrize("kind", ["format", "size"])
def test_images_that_are_never_decoded_are_found_before_the_run(
    kind: str, images: Path, client: MlflowClient, tmp_path: Path
) -> None:
    """The suffix is right, and Pillow opens the file, but the decoder reads neither this format nor this size."""
    shutil.copytree(images, tmp_path / "copy")
    path = tmp_path / "copy" / "val" / "blue" / "000.png"
    if kind == "format":
        Image.new("RGB", (32, 32)).save(path, "ICO")
    else:
        Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(BadImageError, match=r"000\.png") as caught:
        run(tmp_path / "copy")
    assert caught.value.code == "image-header-unreadable"
    assert not client.search_runs([found.experiment_id for found in client.search_experiments()])


def test_skipped_files_are_named_once(with_bad_file: Path) -> None:
    reporter = Reporter()
    run(with_bad_file, "--on-bad-image", "skip", reporter=reporter)
    for name in ("red/004.png", "blue/002.png"):
        assert len([text for text in reporter.warnings if name in text]) == 1
    assert "2 unreadable files were skipped" in reporter.warnings


def test_nothing_readable_to_train_on(with_bad_file: Path) -> None:
    for path in (with_bad_file / "train").glob("*/*.png"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match="no file in '.*train' is a readable image"):
        run(with_bad_file, "--on-bad-image", "skip")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_is_an_error_and_loses_nothing(workers: int, images: Path, client: MlflowClient) -> None:
    def shoot(phase: str, done: int) -> None:
        if (phase, done) == ("training", 3):
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)

    with pytest.raises(DataError, match="a data loading process died .*lower --workers or --batch-size"):
        run(images, "--save-dir", "models", "--workers", workers, reporter=Reporter(shoot))
    assert statuses(client) == ["FAILED"]
    assert list_checkpoints(Path("models"))[0].name == "checkpoint-000003.pth.tar"


def test_nothing_readable_to_validate_on(with_bad_file: Path) -> None:
    for path in (with_bad_file / "val").glob("*/*.png"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match=r"no file in .* is a readable image \(15 tried\)"):
        run(with_bad_file, "--on-bad-image", "skip")


# ---------------------------------------------------------------- a store that fails


class Outage:
    """A switch: while it is `on`, every writing call of the client fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        writing = [(MlflowClient, name) for name in ("log_batch", "log_text", "set_tag", "set_terminated")]
        for owner, name in [*writing, (RunArtifacts, "put_file")]:
            original = getattr(owner, name)

            def call(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                if self.on:
                    raise ConnectionError("Connection refused")
                return _original(*args, **kwargs)

            monkeypatch.setattr(owner, name, call)
        monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.02)
        monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.05)
        monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 2.0)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def assert_all_there(client: MlflowClient, run_id: str | None, directory: Path) -> None:
    """Check that every checkpoint on the disk is uploaded with its manifest, and that tags name the right ones."""
    assert run_id is not None
    uploaded = {item.path.rpartition("/")[2] for item in client.list_artifacts(run_id, "checkpoints")}
    names = {path.name for path in list_checkpoints(directory)}
    assert uploaded == names | {f"{name}.json" for name in names}
    tags = client.get_run(run_id).data.tags
    assert json.loads(tags["checkpoint.latest"])["path"] == "checkpoints/bnps-checkpoint-000012.pth.tar"
    best = max(manifest.val_top1 for manifest in list_manifests(directory) if manifest.val_top1 is not None)
    assert json.loads(tags["checkpoint.best"])["val_top1"] == best


def test_an_outage_in_the_middle_loses_nothing(
    images: Path, client: MlflowClient, outage: Outage, uninterrupted: Any
) -> None:
    def switch(phase: str, done: int) -> None:
        if phase == "training":
            outage.on = 3 <= done <= 9
            time.sleep(0.1)  # else the run is over before anyone notices

    reporter = Reporter(switch)
    summary = run(images, "--save-dir", "models", reporter=reporter)
    assert_same_end(client, summary, uninterrupted)
    assert_all_there(client, summary.run_id, Path("models"))
    assert len([text for text in reporter.warnings if "training goes on" in text]) == 1
    assert summary.pending == 0
    assert max(reporter.waited) > 0
    assert reporter.waited[-1] == 0


def test_a_failed_final_upload_is_repeated(
    images: Path, client: MlflowClient, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last iteration has two checkpoints; the second must not get lost."""
    original = RunArtifacts.put_file
    failing = True

    def refuse_the_last(artifacts: RunArtifacts, path: Path) -> None:
        if failing and "bnps-" in path.name:
            raise ConnectionError("Connection refused")
        original(artifacts, path)

    monkeypatch.setattr(RunArtifacts, "put_file", refuse_the_last)
    reporter = Reporter()
    first = run(images, "--save-dir", "models", reporter=reporter)
    assert first.pending >= 2  # the checkpoint and the end of the run
    assert any("cannot upload the checkpoint bnps-" in text for text in reporter.warnings)
    assert any("`shufflenet sync models`, or the next run" in text for text in reporter.warnings)
    failing = False
    second = run(images, "--save-dir", "models")
    assert (second.run_id, second.pending) == (first.run_id, 0)
    assert_all_there(client, second.run_id, Path("models"))


def test_an_outage_when_stopped_does_not_hide_the_signal(images: Path, outage: Outage) -> None:
    def pull(phase: str, done: int) -> None:
        if (phase, done) == ("training", 5):
            outage.on = True
            signal.raise_signal(signal.SIGTERM)

    reporter = Reporter(pull)
    with StopFlag() as stop:
        summary = run(images, "--save-dir", "models", reporter=reporter, stop=stop)
    assert summary.result.stopped_by == signal.SIGTERM
    assert summary.pending
    assert any("have not reached MLflow" in text for text in reporter.warnings)
    outage.on = False
    assert run(images, "--save-dir", "models").run_id == summary.run_id


@pytest.mark.long
def test_an_outage_at_the_end_leaves_the_rest_to_the_next_start(
    images: Path, client: MlflowClient, outage: Outage, uninterrupted: Any
) -> None:
    def switch(phase: str, done: int) -> None:
        outage.on = outage.on or (phase, done) == ("training", 9)

    first = run(images, "--save-dir", "models", reporter=Reporter(switch))
    assert first.pending
    assert first.result.checkpoint is not None
    assert first.result.checkpoint.name == "bnps-checkpoint-000012.pth.tar"
    outage.on = False
    resumed = run(images, "--save-dir", "models")
    assert_same_end(client, resumed, uninterrupted)
    assert_all_there(client, resumed.run_id, Path("models"))
    assert statuses(client) == ["FINISHED"]
