"""A run that is interrupted anywhere resumes as if nothing had happened; options that would change it are refused."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch.amp.grad_scaler import GradScaler

from shufflenet_mlflow import create_model, save_checkpoint
from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.manifest import read_manifest
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.errors import (
    ConfigError,
    ResumeError,
    ShuffleNetError,
)
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.training.rng import StepRandomness
from shufflenet_mlflow.workflows.train import run_training
from shufflenet_mlflow.workflows.training.request import TrainRequest
from tests.support.command_line import Invoke
from tests.support.effort import only_in_full_run
from tests.support.images import write_images
from tests.support.metrics import history, steps, values
from tests.support.payloads import assert_equal_payloads
from tests.support.training import Reporter, assert_same_end, request, run, run_until


@pytest.mark.parametrize(
    # Before the first report, after the first checkpoint, between two, and at the end; all the others take their time.
    "iteration",
    [pytest.param(number, marks=() if number in (1, 5, 9, 12) else pytest.mark.long) for number in range(1, 13)],
)
def test_a_run_stopped_at_any_iteration_goes_on_as_if_nothing_had_happened(
    iteration: int, images: Path, client: MlflowClient, workplace: Path, uninterrupted: Any
) -> None:
    stopped = run_until(images, "training", iteration, "--save-dir", "models")
    assert stopped.result.iters == iteration
    assert stopped.result.stopped_by == signal.SIGTERM
    assert client.get_run(stopped.run_id).info.status == "KILLED"
    # From the folder, or from the run ID alone in an empty folder, in turn; with other workers.
    source = ["--save-dir", "models"] if iteration % 2 else ["--resume", stopped.run_id, "--save-dir", "elsewhere"]
    resumed = run(images, *source, "--workers", iteration % 3)
    assert resumed.run_id == stopped.run_id
    assert client.get_run(stopped.run_id).info.status == "FINISHED"
    assert_same_end(client, resumed, uninterrupted)


@pytest.mark.parametrize(("phase", "done", "iters"), [("validating", 1, 4), ("re-estimating BN", 2, 12)])
def test_a_run_stopped_in_validation_or_reestimation(
    phase: str, done: int, iters: int, images: Path, client: MlflowClient, uninterrupted: Any
) -> None:
    stopped = run_until(images, phase, done, "--save-dir", "models", by=signal.SIGINT)
    assert (stopped.result.iters, stopped.result.stopped_by) == (iters, signal.SIGINT)
    assert_same_end(client, run(images, "--save-dir", "models"), uninterrupted)


@pytest.mark.parametrize("iteration", [1, 9, *(pytest.param(number, marks=pytest.mark.long) for number in (6, 11))])
def test_a_run_that_died_repeats_no_step(
    iteration: int, images: Path, client: MlflowClient, uninterrupted: Any
) -> None:
    """Nothing is saved when it dies: points logged since the last checkpoint are logged again, and kept once."""

    class Death(BaseException):
        pass

    def die(phase: str, done: int) -> None:
        if (phase, done) == ("training", iteration):
            raise Death

    with pytest.raises(Death):
        run(images, "--save-dir", "models", reporter=Reporter(die))
    [died] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert died.info.status == "FAILED"
    resumed = run(images, "--save-dir", "models")
    assert resumed.run_id == died.info.run_id  # also from its beginning, if it died before its first checkpoint
    assert_same_end(client, resumed, uninterrupted)


def test_comparison_with_the_uninterrupted_run_can_fail(images: Path, client: MlflowClient, uninterrupted: Any) -> None:
    """Negative control: the comparison notices one tensor's momentum that is lost on resuming."""
    summary = run_until(images, "training", 6, "--save-dir", "models")
    path = list_checkpoints(Path("models"))[0]
    payload = read_checkpoint(path)
    payload["optimizer_state_dict"]["state"][0]["momentum_buffer"].zero_()
    torch.save(payload, path)
    path.with_name(path.name + ".json").unlink()
    resumed = run(images, "--save-dir", "models")
    assert resumed.run_id == summary.run_id
    with pytest.raises(AssertionError):
        assert_same_end(client, resumed, uninterrupted)


EMA_KEY = "first_conv.0.weight"
FEW = ["--total-iters", 4, "--val-interval", 4]
DROPOUT = ["--model", "shufflenet_oneshot", *FEW]


def whole_and_parts(images: Path, *options: object) -> tuple[Any, Any]:
    """Return the last checkpoints of a run and of one that was interrupted after two iterations."""
    whole = run(images, *options, "--save-dir", "whole")
    run_until(images, "training", 2, *options, "--save-dir", "parts")
    torch.manual_seed(12345)
    torch.rand(3)
    parts = run(images, *options, "--save-dir", "parts")
    assert whole.result.checkpoint
    assert parts.result.checkpoint
    return read_checkpoint(whole.result.checkpoint), read_checkpoint(parts.result.checkpoint)


@pytest.mark.long
def test_dropout_resumes(images: Path) -> None:
    whole, parts = whole_and_parts(images, *DROPOUT)
    assert_equal_payloads(whole["state_dict"], parts["state_dict"])


def test_a_generator_that_is_not_restored_is_noticed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(StepRandomness, "load_state_dict", lambda *_: None)
    whole, parts = whole_and_parts(images, *DROPOUT)
    with pytest.raises(AssertionError):
        assert_equal_payloads(whole["state_dict"], parts["state_dict"])


@pytest.mark.long
def test_the_moving_average_resumes(images: Path, shufflenet: Invoke) -> None:
    whole, parts = whole_and_parts(images, "--ema-decay", 0.9)
    assert_equal_payloads(whole["ema_state_dict"], parts["ema_state_dict"])
    assert_equal_payloads(whole["state_dict"], parts["state_dict"])
    assert not torch.equal(whole["ema_state_dict"][EMA_KEY], whole["state_dict"][EMA_KEY])
    # Accuracies are of the average, in training and in evaluation alike.
    result = json.loads(shufflenet("eval", "parts", "--json").stdout)
    assert (result["top1"], result["loss"]) == (parts["metrics"]["val/top1"], parts["metrics"]["val/loss"])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_resumes(amp: str, images: Path) -> None:
    whole, parts = whole_and_parts(images, *FEW, "--amp", amp)
    assert_equal_payloads(whole["state_dict"], parts["state_dict"])
    assert_equal_payloads(whole["optimizer_state_dict"], parts["optimizer_state_dict"])
    assert ("scaler_state_dict" in whole) == (amp == "fp16")
    assert whole.get("scaler_state_dict") == parts.get("scaler_state_dict")
    assert {tensor.dtype for tensor in whole["state_dict"].values()} == {torch.float32, torch.int64}


@only_in_full_run
@pytest.mark.long
def test_a_compiled_network_resumes(images: Path) -> None:
    whole, parts = whole_and_parts(images, "--compile")
    for name in ("state_dict", "optimizer_state_dict"):
        assert_equal_payloads(parts[name], whole[name])
    assert not [name for name in whole["state_dict"] if "_orig_mod" in name]


@only_in_full_run
@pytest.mark.long
def test_a_network_that_cannot_be_compiled(images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()  # what this process has compiled before
    with pytest.raises(ConfigError, match=r"--compile: .*No working C\+\+ compiler found.*; leave it out"):
        run(images, "--compile")


def test_a_scaler_that_is_not_restored_is_noticed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a few iterations do not change the scale, but they count towards its growth."""
    monkeypatch.setattr(GradScaler, "load_state_dict", lambda *_: None)
    whole, parts = whole_and_parts(images, *FEW, "--amp", "fp16")
    assert whole["scaler_state_dict"] != parts["scaler_state_dict"]


def test_the_moving_average_is_what_its_decay_says(images: Path) -> None:
    run(images, "--ema-decay", 0.75, "--save-interval", 1, "--val-interval", 12, "--save-dir", "m")
    states = [read_checkpoint(Path(f"m/checkpoint-{iters:06}.pth.tar")) for iters in (5, 6)]
    before, after = states[0]["ema_state_dict"][EMA_KEY], states[1]["ema_state_dict"][EMA_KEY]
    torch.testing.assert_close(after, 0.75 * before + 0.25 * states[1]["state_dict"][EMA_KEY])


def test_stopped_before_the_first_iteration(images: Path, client: MlflowClient) -> None:
    """Nothing has been created by then, so nothing is left behind."""
    with StopFlag() as stop, pytest.raises(StopRequested):
        signal.raise_signal(signal.SIGTERM)
        run(images, stop=stop)
    assert client.search_experiments(filter_string="name = 'shufflenet'") == []
    assert not Path("models").exists()


def test_a_complete_run_is_left_alone(images: Path, client: MlflowClient) -> None:
    first = run(images, "--save-dir", "models")
    files = {path: path.stat().st_mtime_ns for path in list_checkpoints(Path("models"))}
    before = history(client, first.run_id)
    second = run(images, "--save-dir", "models")
    assert second.was_complete
    assert second.to_dict() == first.to_dict()
    assert {path: path.stat().st_mtime_ns for path in list_checkpoints(Path("models"))} == files
    assert history(client, first.run_id) == before
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_resuming_needs_no_other_option(images: Path) -> None:
    stopped = run_until(images, "training", 3, "--momentum", 0.8, "--seed", 7)
    resumed = run_training(TrainRequest({}, resume=stopped.run_id), reporter=Reporter(), stop=StopFlag())
    assert resumed.result.iters == 12
    payload = read_checkpoint(resumed.save_dir / "bnps-checkpoint-000012.pth.tar")
    assert (payload["config"]["momentum"], payload["config"]["seed"]) == (0.8, 7)


def test_options_that_change_the_run_are_refused(images: Path) -> None:
    run_until(images, "training", 2, "--save-dir", "models")
    refused = [
        (["--seed", 3], r"changed --seed \(0 -> 3\); leave them out, or start a new run with --resume none"),
        (["--batch-size", 4], r"--batch-size \(8 -> 4\)"),
        (["--model", "shufflenet_oneshot"], r"--model \(shufflenet_v2_x0_5 -> shufflenet_oneshot\)"),
        (["--num-classes", 5], r"--num-classes \(3 -> 5\)"),
        (["--lr", 0.5], r"--lr \(0.02 -> 0.5\); leave them as they were, or pass --new-run"),
        (["--total-iters", 20], r"--total-iters \(12 -> 20\)"),
    ]
    for changed, message in refused:
        with pytest.raises(ResumeError, match=message):
            run(images, "--save-dir", "models", *changed)


def test_options_that_keep_the_weights_may_change(images: Path) -> None:
    run_until(images, "training", 2, "--save-dir", "models")
    harmless = ["--workers", 1, "--display-interval", 3, "--val-interval", 6, "--save-interval", 7, "--device", "cpu"]
    assert run(images, "--save-dir", "models", *harmless).result.iters == 12


def test_a_stop_in_validation_does_not_rewrite_what_was_committed(images: Path, client: MlflowClient) -> None:
    """The checkpoint saved at the stop is what `latest` names; validated later, it becomes the best as it is."""
    stopped = run_until(images, "validating", 1, "--save-dir", "models")
    path = Path("models/checkpoint-000004.pth.tar")
    before = path.read_bytes()
    run(images, "--save-dir", "models", "--total-iters", 12)
    assert path.read_bytes() == before
    verify_checkpoint(path)
    [top1] = [p.value for p in client.get_metric_history(stopped.run_id, "val/top1") if p.step == 4]
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.val_top1 == top1
    best = json.loads(client.get_run(stopped.run_id).data.tags["checkpoint.best"])
    if best["iters"] == 4:
        assert best["sha256"] == manifest.sha256


def test_a_run_is_not_rewound(images: Path, client: MlflowClient) -> None:
    first = run(images, "--save-dir", "models")
    before = dict(client.get_run(first.run_id).data.tags)
    with pytest.raises(
        ResumeError, match="is already at iteration 12, and this checkpoint is from iteration 5; --resume"
    ):
        run(images, "--resume", f"{first.run_id}@5", "--val-interval", 12)
    assert client.get_run(first.run_id).data.tags == before
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_corrupt_latest_artifact_does_not_block_resuming(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    artifacts = Path(client.get_run(stopped.run_id).info.artifact_uri.removeprefix("file://")) / "checkpoints"
    (artifacts / "checkpoint-000006.pth.tar").write_bytes(b"PK")
    resumed = run(images, "--resume", stopped.run_id, "--save-dir", "elsewhere")
    assert resumed.result.iters == 12
    assert steps(client, stopped.run_id, "train/loss") == [2, 4, 6, 8, 10, 12]


def test_the_loss_of_a_checkpoint_does_not_depend_on_interruptions(images: Path, client: MlflowClient) -> None:
    options = ["--display-interval", 20, "--save-interval", 3, "--val-interval", 12]
    whole = run(images, *options, "--save-dir", "whole")
    stopped = run_until(images, "training", 1, *options, "--save-dir", "parts")
    run(images, *options, "--save-dir", "parts")
    expected = values(client, whole.run_id, "loss")
    assert len(set(expected)) == 4
    assert values(client, stopped.run_id, "loss")[1:] == expected


def test_a_fork_trains_with_its_own_rates(images: Path) -> None:
    """Loading the optimizer's state restores the old rates; a fork's own must replace them."""
    run_until(images, "training", 6, "--save-dir", "models")
    changed = ["--lr", 0.5, "--momentum", 0.1, "--weight-decay", 0.25, "--total-iters", 24, "--val-interval", 24]
    fork = run(images, "--resume", "models", "--new-run", "--save-dir", "fork", "--save-interval", 12, *changed)
    groups = read_checkpoint(fork.save_dir / "checkpoint-000012.pth.tar")["optimizer_state_dict"]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.1, 0.1]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert [group["lr"] for group in groups] == pytest.approx([0.25, 0.25])


def test_a_fork_does_not_write_into_its_parents_folder(images: Path) -> None:
    run_until(images, "training", 6, "--save-dir", "models")
    before = {path: path.read_bytes() for path in list_checkpoints(Path("models"))}
    with pytest.raises(ResumeError, match="for a fork pass --resume models and another --save-dir"):
        run(images, "--save-dir", "models", "--new-run")
    assert {path: path.read_bytes() for path in list_checkpoints(Path("models"))} == before


def test_a_new_run_forks(images: Path, client: MlflowClient) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    before = history(client, stopped.run_id)
    fork = run(images, "--resume", stopped.run_id, "--new-run", "--lr", 0.5, "--save-dir", "fork")
    assert fork.run_id != stopped.run_id
    tags = client.get_run(fork.run_id).data.tags
    assert (tags["resumed.from_run"], tags["resumed.from_iters"]) == (stopped.run_id, "6")
    assert steps(client, fork.run_id, "train/loss") == [8, 10, 12]
    assert history(client, stopped.run_id) == before
    with pytest.raises(ResumeError, match=f"'models' holds checkpoints of run {stopped.run_id}; name another folder"):
        run(images, "--resume", stopped.run_id, "--new-run", "--save-dir", "models")
    save_checkpoint({"state_dict": {}}, 1, directory="mine")
    with pytest.raises(ResumeError, match="'mine' holds checkpoints of another run; name another folder"):
        run(images, "--resume", stopped.run_id, "--new-run", "--save-dir", "mine")


def test_a_fork_does_not_claim_the_best_checkpoint_of_its_parent(images: Path, client: MlflowClient) -> None:
    begun = run(images, "--save-dir", "models", "--total-iters", 6, "--val-interval", 3)
    worse = ["--lr", 1e-9, "--total-iters", 8, "--val-interval", 8]
    fork = run(images, "--resume", begun.run_id, "--new-run", "--save-dir", "fork", *worse)
    assert begun.result.best is not None
    assert fork.result.best == {"val_top1": fork.result.val_top1, "iters": 8}
    assert values(client, fork.run_id, "best/val_top1") == [fork.result.val_top1]


def test_weights_bring_the_size_of_their_images(images: Path) -> None:
    begun = run(images, "--save-dir", "models", "--total-iters", 1, "--input-size", 64)
    asked = request(images, "--init-from", f"runs:/{begun.run_id}", "--save-dir", "tuned", "--total-iters", 1)
    without = replace(asked, options={name: value for name, value in asked.options.items() if name != "input_size"})
    tuned = run_training(without, reporter=Reporter(), stop=StopFlag())
    assert read_checkpoint(tuned.result.checkpoint)["config"]["input_size"] == 64


def test_a_fork_that_is_stopped_at_once_can_be_resumed(images: Path) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    fork_of = ["--resume", stopped.run_id, "--new-run", "--save-dir", "fork"]
    fork = run_until(images, "training", 6, *fork_of)  # as soon as the phase begins, before its first iteration
    assert fork.result.checkpoint == Path("fork/checkpoint-000006.pth.tar")
    assert run(images, "--resume", fork.run_id, "--save-dir", "elsewhere").run_id == fork.run_id


def test_other_images_are_refused(images: Path, tmp_path: Path) -> None:
    mine = write_images(tmp_path / "mine")
    stopped = run_until(images, "training", 2, "--train-dir", mine, "--save-dir", "models")
    copy = write_images(tmp_path / "copy")
    (copy / "red" / "000.png").unlink()
    with pytest.raises(ResumeError, match="does not hold the images that the run began with"):
        run(images, "--train-dir", copy, "--save-dir", "models")
    write_images(tmp_path / "same")  # the same content in another place is fine
    assert run(images, "--train-dir", tmp_path / "same", "--save-dir", "models").run_id == stopped.run_id


def test_none_refuses_a_folder_in_use(images: Path) -> None:
    run_until(images, "training", 2, "--save-dir", "models")
    with pytest.raises(ResumeError, match="--save-dir 'models' holds checkpoints already"):
        run(images, "--save-dir", "models", "--resume", "none")


def test_another_store_does_not_know_the_run(images: Path, tmp_path: Path, empty_database: Path) -> None:
    run_until(images, "training", 2, "--save-dir", "models")
    shutil.copy(empty_database, tmp_path / "other.db")
    with pytest.raises(ResumeError, match="--new-run continues as a run of its own, --tracking-uri names another"):
        run(images, "--save-dir", "models", "--tracking-uri", f"sqlite:///{tmp_path}/other.db")


def test_weights_alone_cannot_be_resumed(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000100.pth.tar"
    torch.save({"state_dict": create_model("shufflenet_v2_x0_5", 3).state_dict()}, path)
    with pytest.raises(ShuffleNetError, match="it lacks optimizer_state_dict.* and 12 more; --init-from starts"):
        run(images, "--resume", path)
