"""Training end to end on real files and a real store: what it logs and what it saves."""

import json
import os
import queue
import signal
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.runtime.signals import StopFlag
from tests.support.images import CLASSES, write_images
from tests.support.metrics import steps, values
from tests.support.training import Reporter, run

TRAIN_METRICS = {"train/loss", "train/top1", "train/top5", "train/lr", "train/images_per_second"}


def test_a_whole_run(images: Path, client: MlflowClient, workplace: Path) -> None:
    summary = run(images, "--run-name", "my run")
    tracked = client.get_run(summary.run_id)
    assert (tracked.info.status, tracked.info.run_name) == ("FINISHED", "my run")
    assert summary.save_dir == Path("models") / summary.run_id
    names = [path.name for path in list_checkpoints(summary.save_dir)]
    assert names[0] == "bnps-checkpoint-000012.pth.tar"
    assert {"checkpoint-000012.pth.tar", "checkpoint-000010.pth.tar", "checkpoint-000005.pth.tar"} <= set(names)
    for name in TRAIN_METRICS:
        assert steps(client, summary.run_id, name) == [2, 4, 6, 8, 10, 12]
    for name in ("val/loss", "val/top1", "val/top5"):
        assert steps(client, summary.run_id, name) == [4, 8, 12]
    saved = sorted({int(name[-14:-8]) for name in names})
    assert steps(client, summary.run_id, "epoch") == steps(client, summary.run_id, "loss") == saved
    assert values(client, summary.run_id, "epoch") == [iters // 4 for iters in saved]
    assert values(client, summary.run_id, "train/lr") == pytest.approx(
        [0.02 * (1 - (step - 1) / 12) for step in (2, 4, 6, 8, 10, 12)]
    )
    top1 = values(client, summary.run_id, "val/top1")
    assert summary.result.val_top1 == top1[-1]
    assert values(client, summary.run_id, "best/val_top1") == [max(top1)]
    latest = json.loads(tracked.data.tags["checkpoint.latest"])
    assert latest["path"] == "checkpoints/bnps-checkpoint-000012.pth.tar"
    assert latest["val_top1"] == top1[-1]
    best = json.loads(tracked.data.tags["checkpoint.best"])
    assert best["val_top1"] == max(top1)
    artifacts = {item.path for item in client.list_artifacts(summary.run_id, "checkpoints")}
    assert artifacts == {f"checkpoints/{name}{end}" for name in names for end in ("", ".json")}


def test_params_tags_and_inputs(images: Path, client: MlflowClient) -> None:
    summary = run(images)
    tracked = client.get_run(summary.run_id)
    params = tracked.data.params
    assert (params["lr"], params["weight_decay"], params["total_iters"], params["epochs"]) == (
        "0.02",
        "4e-05",
        "12",
        "3",
    )
    assert (params["model"], params["num_classes"]) == ("shufflenet_v2_x0_5", "3")
    tags = tracked.data.tags
    assert tags["network"] == "shufflenet_v2_x0_5"
    assert tags["version.torch"] == torch.__version__.partition("+")[0] or tags["version.torch"] == torch.__version__
    assert {"version.mlflow", "version.torchvision", "version.python", "mlflow.user"} <= tags.keys()
    inputs = {item.tags[0].value: item.dataset for item in tracked.inputs.dataset_inputs}
    assert inputs.keys() == {"training", "validation"}
    assert inputs["training"].digest != inputs["validation"].digest
    config = json.loads(Path(client.download_artifacts(summary.run_id, "config.json")).read_text())
    assert config["train_dir"] == str(images / "train")
    assert str(config["lr"]) == params["lr"]
    classes = json.loads(Path(client.download_artifacts(summary.run_id, "classes.json")).read_text())
    assert classes == {name: label for label, name in enumerate(CLASSES)}


def test_a_checkpoint_holds_the_whole_state(images: Path) -> None:
    summary = run(images)
    payload = read_checkpoint(summary.save_dir / "checkpoint-000010.pth.tar")
    assert {
        "format_version",
        "state_dict",
        "optimizer_state_dict",
        "lr_scheduler_state_dict",
        "iters",
        "epoch",
        "loss",
        "metrics",
        "best",
        "rng_state",
        "sampler_state",
        "model",
        "preprocess",
        "class_to_idx",
        "config",
        "run_id",
        "created_at",
    } <= payload.keys()
    assert payload["model"] == {"name": "shufflenet_v2_x0_5", "kwargs": {"num_classes": 3}}
    assert payload["preprocess"] == Preprocess("bgr255", 32).to_dict()
    assert payload["run_id"] == summary.run_id
    assert (payload["sampler_state"]["epoch"], payload["sampler_state"]["position"]) == (2, 2)


def test_bn_statistics_are_reestimated_at_the_end(images: Path) -> None:
    summary = run(images)
    before = read_checkpoint(summary.save_dir / "checkpoint-000012.pth.tar")["state_dict"]
    after = read_checkpoint(summary.save_dir / "bnps-checkpoint-000012.pth.tar")["state_dict"]
    for key in before:
        if "running" in key:
            assert not torch.equal(before[key], after[key])
        elif "num_batches_tracked" not in key:
            assert torch.equal(before[key], after[key])


def test_the_network_learns(images: Path) -> None:
    summary = run(images, "--total-iters", 60, "--augment", "none", "--lr", 0.02)
    assert summary.result.val_top1 is not None
    assert summary.result.val_top1 > 0.8  # chance is a third


def test_one_class_is_mentioned(tmp_path: Path) -> None:
    """Most likely it is the wrong folder."""
    for part in ("train", "val"):
        write_images(tmp_path / part, classes=("only",), per_class=8)
    reporter = Reporter()
    run(tmp_path, "--total-iters", 1, reporter=reporter)
    assert f"{str(tmp_path / 'train')!r} has one class only; a classifier needs at least two" in reporter.notes


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        stop.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal_ends_at_once_unless_a_launcher_repeats_the_first(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torchrun` forwards signals that its processes have received themselves."""

    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", ended.put)
    monkeypatch.setattr("shufflenet_mlflow.runtime.signals.ECHO_SECONDS", 0.2)
    if launched:
        monkeypatch.setenv("RANK", "1")
    with StopFlag() as stop:
        stop.set(signal.SIGTERM)  # another process has received one
        signal.raise_signal(signal.SIGTERM)
        if launched:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert ended.empty()
        signal.raise_signal(signal.SIGTERM)
        assert ended.get(timeout=10) == 143


def test_the_first_signal_is_announced() -> None:
    heard: list[str] = []
    with StopFlag(heard.append) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["SIGTERM"]
    assert stop.signum == signal.SIGTERM
