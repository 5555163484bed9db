"""The loop end to end on real files and a real store: what it logs, what it keeps, how it ends and goes on."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, assert_equal_payloads, small_options, steps, values, write_images
from mlflow import MlflowClient
from shufflenet_mlflow.cli.train import REQUEST_OPTIONS, train

from shufflenet_mlflow import create_model
from shufflenet_mlflow.checkpoint import list_checkpoints, read_checkpoint, read_record, verify_checkpoint
from shufflenet_mlflow.errors import (
    BadImageError,
    ConfigError,
    DataError,
    NonFiniteLossError,
    ResumeError,
    ShuffleNetError,
    TrackingError,
)
from shufflenet_mlflow.jobs import TrainSummary, run_training
from shufflenet_mlflow.reporting import LoggingReporter, Phase
from shufflenet_mlflow.start import TrainRequest
from shufflenet_mlflow.state import Meter, TrainingState
from shufflenet_mlflow.stopping import StopFlag
from shufflenet_mlflow.tracking import delivery

TRAIN_METRICS = {"train/loss", "train/top1", "train/top5", "train/lr", "train/images_per_second"}


class Reporter(LoggingReporter):
    """Calls `at(phase, done)` after each unit of each phase: where tests pull the plug."""

    def __init__(self, at: Callable[[str, int], None] = lambda *_: None) -> None:
        self.at = at
        self.warnings: list[str] = []

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        reporter = self

        class Counting:
            def __init__(self) -> None:
                self.done = done

            def advance(self) -> None:
                self.done += 1
                reporter.at(name, self.done)

        yield Counting()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def request(images: Path, *arguments: object) -> TrainRequest:
    """What the command line makes of its arguments."""
    words = [str(argument) for argument in (*small_options(images), *arguments)]
    with train.make_context("train", words) as context:
        given = {name: value for name, value in context.params.items() if value is not None}
    given.pop("as_json")
    chosen = {name: given.pop(name) for name in REQUEST_OPTIONS if name in given}
    return TrainRequest(options=given, **chosen)


def run(
    images: Path, *arguments: object, reporter: Reporter | None = None, stop: StopFlag | None = None
) -> TrainSummary:
    return run_training(request(images, *arguments), reporter=reporter or Reporter(), stop=stop or StopFlag())


def run_until(images: Path, phase: str, done: int, *arguments: object, by: int = signal.SIGTERM) -> TrainSummary:
    """Train, and receive a real signal after `done` units of `phase`."""

    def pull(name: str, count: int) -> None:
        if (name, count) == (phase, done):
            signal.raise_signal(by)

    with StopFlag() as stop:
        return run(images, *arguments, reporter=Reporter(pull), stop=stop)


# ---------------------------------------------------------------- what a run leaves behind


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
    assert payload["preprocess"] == {"mode": "bgr255", "input_size": 32}
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
    summary = run(images, "--total-iters", 60, "--augment", "none", "--lr", 0.05)
    assert summary.result.val_top1 is not None
    assert summary.result.val_top1 > 0.8  # chance is a third


# ---------------------------------------------------------------- interruption and resuming


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, cache_dir: Path) -> Any:
    """The final payload and the metric history of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    uri = f"sqlite:///{folder}/mlflow.db"
    summary = run(images, "--save-dir", folder / "models", "--tracking-uri", uri)
    return read_checkpoint(folder / "models" / "bnps-checkpoint-000012.pth.tar"), history(
        MlflowClient(uri), summary.run_id
    )


def history(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric's points in logged order, but for the one that measures time."""
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in client.get_run(run_id).data.metrics
        if name != "train/images_per_second"
    }


def assert_same_end(client: MlflowClient, summary: TrainSummary, uninterrupted: Any) -> None:
    """Bit for bit the same weights, momentum and BN; point for point the same metrics."""
    payload, metrics = uninterrupted
    assert summary.result.checkpoint is not None
    ended = read_checkpoint(summary.result.checkpoint)
    varying = ("run_id", "created_at", "config")
    assert_equal_payloads(
        {key: value for key, value in ended.items() if key not in varying},
        {key: value for key, value in payload.items() if key not in varying},
    )
    found = history(client, summary.run_id)
    # An extra checkpoint at the moment of the interruption has points of its own.
    for name in ("epoch", "loss"):
        of_reference = {step for step, _ in metrics[name]}
        assert len({step for step, _ in found[name]}) == len(found[name])
        found[name] = [point for point in found[name] if point[0] in of_reference]
    assert found == metrics
    throughput = steps(client, summary.run_id, "train/images_per_second")
    assert throughput == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("iteration", range(1, 13))
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


@pytest.mark.parametrize("iteration", [1, 6, 9, 11])
def test_a_run_that_died_repeats_no_step(
    iteration: int, images: Path, client: MlflowClient, uninterrupted: Any
) -> None:
    """Nothing is saved at the moment of death: what was logged since the last checkpoint comes again."""

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
    if iteration < 4:  # before the first checkpoint there is nothing to resume from
        assert resumed.run_id != died.info.run_id
    else:
        assert resumed.run_id == died.info.run_id
    assert_same_end(client, resumed, uninterrupted)


def test_comparison_with_the_uninterrupted_run_can_fail(images: Path, client: MlflowClient, uninterrupted: Any) -> None:
    """Negative control: another seed of one generator after the resumption is noticed."""
    summary = run_until(images, "training", 6, "--save-dir", "models", "--model", "shufflenet_v2_x0_5")
    path = list_checkpoints(Path("models"))[0]
    payload = read_checkpoint(path)
    payload["optimizer_state_dict"]["state"][0]["momentum_buffer"].zero_()
    torch.save(payload, path)
    path.with_name(path.name + ".json").unlink()
    resumed = run(images, "--save-dir", "models")
    assert resumed.run_id == summary.run_id
    with pytest.raises(AssertionError):
        assert_same_end(client, resumed, uninterrupted)


def test_dropout_goes_on_where_it_was(images: Path) -> None:
    options = ["--model", "shufflenet_oneshot", "--total-iters", 4, "--val-interval", 4, "--tracking-uri"]
    uri = os.environ["MLFLOW_TRACKING_URI"]
    whole = run(images, *options, uri, "--save-dir", "whole")
    run_until(images, "training", 2, *options, uri, "--save-dir", "parts")
    torch.manual_seed(12345)
    torch.rand(3)
    parts = run(images, *options, uri, "--save-dir", "parts")
    assert whole.result.checkpoint
    assert parts.result.checkpoint
    assert_equal_payloads(
        read_checkpoint(whole.result.checkpoint)["state_dict"], read_checkpoint(parts.result.checkpoint)["state_dict"]
    )


def test_stopped_before_the_first_iteration(images: Path, client: MlflowClient) -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        summary = run(images, stop=stop)
    assert (summary.result.iters, summary.result.checkpoint) == (0, None)
    assert client.get_run(summary.run_id).info.status == "KILLED"


def test_a_complete_run_is_left_alone(images: Path, client: MlflowClient) -> None:
    first = run(images, "--save-dir", "models")
    files = {path: path.stat().st_mtime_ns for path in list_checkpoints(Path("models"))}
    before = history(client, first.run_id)
    again = run(images, "--save-dir", "models")
    assert again.was_complete
    assert again.to_dict() == first.to_dict()
    assert {path: path.stat().st_mtime_ns for path in list_checkpoints(Path("models"))} == files
    assert history(client, first.run_id) == before
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_resuming_needs_no_other_option(images: Path) -> None:
    stopped = run_until(images, "training", 3, "--momentum", 0.8, "--seed", 7)
    resumed = run_training(TrainRequest({}, resume=stopped.run_id), reporter=Reporter(), stop=StopFlag())
    assert resumed.result.iters == 12
    payload = read_checkpoint(resumed.save_dir / "bnps-checkpoint-000012.pth.tar")
    assert (payload["config"]["momentum"], payload["config"]["seed"]) == (0.8, 7)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", 3], r"changed --seed \(0 -> 3\); leave them out, or train anew"),
        (["--batch-size", 4], r"--batch-size \(8 -> 4\)"),
        (["--model", "shufflenet_oneshot"], r"--model \(shufflenet_v2_x0_5 -> shufflenet_oneshot\)"),
        (["--num-classes", 5], r"--num-classes \(3 -> 5\)"),
        (["--lr", 0.5], r"--lr \(0.02 -> 0.5\); leave them as they were, or pass --new-run"),
        (["--total-iters", 20], r"--total-iters \(12 -> 20\)"),
    ],
)
def test_options_that_change_the_run_are_refused(changed: list[object], message: str, images: Path) -> None:
    run_until(images, "training", 2, "--save-dir", "models")
    with pytest.raises(ResumeError, match=message):
        run(images, "--save-dir", "models", *changed)


def test_harmless_options_may_change(images: Path) -> None:
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
    record = read_record(path)
    assert record is not None
    assert record.val_top1 == top1
    best = json.loads(client.get_run(stopped.run_id).data.tags["checkpoint.best"])
    if best["iters"] == 4:
        assert best["sha256"] == record.sha256


def test_a_run_is_not_rewound(images: Path, client: MlflowClient) -> None:
    first = run(images, "--save-dir", "models")
    before = dict(client.get_run(first.run_id).data.tags)
    with pytest.raises(ResumeError, match="has gone on to iteration 12, this checkpoint is of 5; --resume"):
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
    """Loading the optimizer's state brings the old rates back: a fork's own must win."""
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
    with pytest.raises(ResumeError, match="holds checkpoints of run"):
        run(images, "--resume", stopped.run_id, "--new-run", "--save-dir", "models")


def test_a_fork_that_is_stopped_at_once_can_be_resumed(images: Path) -> None:
    stopped = run_until(images, "training", 6, "--save-dir", "models")
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        fork = run(images, "--resume", stopped.run_id, "--new-run", "--save-dir", "fork", stop=stop)
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


def test_another_store_does_not_know_the_run(images: Path, tmp_path: Path) -> None:
    run_until(images, "training", 2, "--save-dir", "models")
    with pytest.raises(ResumeError, match="--new-run continues as a run of its own, --tracking-uri names another"):
        run(images, "--save-dir", "models", "--tracking-uri", f"sqlite:///{tmp_path}/other.db")


def test_weights_alone_cannot_be_resumed(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000100.pth.tar"
    torch.save({"state_dict": create_model("shufflenet_v2_x0_5", 3).state_dict()}, path)
    with pytest.raises(ShuffleNetError, match="it has no optimizer_state_dict"):
        run(images, "--resume", path)


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
    for path in list_checkpoints(Path("models")):
        state_dict = read_checkpoint(path)["state_dict"]
        assert np.isfinite(read_checkpoint(path)["loss"])
        assert "classifier.0.weight" in state_dict


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
    state.best, state.iters = None, 5
    assert not state.record_validation({"val/top1": float("nan")})
    assert state.record_validation({"val/top1": 0.2})
    assert not state.record_validation({"val/top1": float("nan")})
    assert not state.record_validation({"val/top1": 0.2})
    assert state.record_validation({"val/top1": 0.3})
    assert state.best == {"val_top1": 0.3, "iters": 5}


@pytest.fixture
def with_bad_file(tmp_path: Path) -> Path:
    """36 training images, one of which is cut off, and 15 validation images, one of which is no image."""
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", per_class=5, seed=1)
    whole = (tmp_path / "train" / "red" / "004.png").read_bytes()
    (tmp_path / "train" / "red" / "004.png").write_bytes(whole[:200])
    (tmp_path / "val" / "blue" / "002.png").write_bytes(b"GIF89a no")
    return tmp_path


def test_a_bad_image_fails_the_run_and_loses_nothing(with_bad_file: Path, client: MlflowClient) -> None:
    with pytest.raises(BadImageError, match=r"red/004.png' is not a readable image .*--on-bad-image skip"):
        run(with_bad_file, "--save-dir", "models")
    assert statuses(client) == ["FAILED"]
    checkpoints = list_checkpoints(Path("models"))
    resumed = run(with_bad_file, "--save-dir", "models", "--on-bad-image", "skip")
    if checkpoints:  # the bad file may have been in the very first batch
        assert statuses(client) == ["FINISHED"]
    assert resumed.result.iters == 12
    assert client.get_run(resumed.run_id).data.metrics["data/unreadable_files"] == 2


def test_skipped_files_are_named_once(with_bad_file: Path) -> None:
    reporter = Reporter()
    run(with_bad_file, "--on-bad-image", "skip", reporter=reporter)
    for name in ("red/004.png", "blue/002.png"):
        assert len([text for text in reporter.warnings if name in text]) == 1
    assert "2 unreadable files were left out" in reporter.warnings


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
    with pytest.raises(DataError, match="none of the 15 files in .* is a readable image"):
        run(with_bad_file, "--on-bad-image", "skip")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--batch-size", 37], DataError, "36 images, fewer than one batch of 37"),
        (["--batch-size", 1], ConfigError, r"--batch-size \(=1\) must be at least 2"),
        (["--input-size", 50], ConfigError, r"\(=50\) must be a multiple of 32"),
        (["--lr", 0], ConfigError, r"--lr \(=0.0\) must be above 0"),
        (["--momentum", 1], ConfigError, r"--momentum \(=1.0\)"),
        (["--label-smooth", 1], ConfigError, r"--label-smooth \(=1.0\)"),
        (["--num-classes", 2], ConfigError, r"--num-classes \(=2\) is below the 3 classes"),
        (["--epochs", 3], ConfigError, "--epochs and --total-iters exclude each other"),
        (["--device", "cuda:99"], ConfigError, "--device cuda:99: this machine has"),
        (["--device", "tpu"], ConfigError, r"--device \(=tpu\)"),
        (["--workers", -1], ConfigError, r"--workers \(=-1\)"),
        (["--save-interval", 0], ConfigError, r"--save-interval \(=0\)"),
        (["--seed", -1], ConfigError, r"--seed \(=-1\)"),
        (["--val-dir", "nowhere"], DataError, "--val-dir '.*nowhere' does not exist"),
    ],
)
def test_bad_options_leave_no_run_behind(
    arguments: list[object], error: type[ShuffleNetError], message: str, images: Path, client: MlflowClient
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(images, *arguments)
    assert "\n" not in str(caught.value)
    assert statuses(client) == []
    assert not Path("models").exists()


def test_one_folder_alone_is_refused(images: Path) -> None:
    with pytest.raises(ConfigError, match="--val-dir is missing; give both folders, or neither"):
        run_training(TrainRequest({"train_dir": images / "train"}), reporter=Reporter(), stop=StopFlag())


# ---------------------------------------------------------------- a store that fails


class Outage:
    """Makes every writing call of the client fail while it lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        for name in ("log_batch", "log_artifact", "set_tag", "set_terminated"):
            original = getattr(MlflowClient, name)

            def call(client: MlflowClient, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                if self.on:
                    raise ConnectionError("Connection refused")
                return _original(client, *args, **kwargs)

            monkeypatch.setattr(MlflowClient, name, call)
        monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.0)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def test_an_outage_in_the_middle_loses_nothing(
    images: Path, client: MlflowClient, outage: Outage, uninterrupted: Any
) -> None:
    def switch(phase: str, done: int) -> None:
        if phase == "training":
            outage.on = 3 <= done <= 9

    reporter = Reporter(switch)
    summary = run(images, "--save-dir", "models", reporter=reporter)
    assert_same_end(client, summary, uninterrupted)
    assert len([text for text in reporter.warnings if "training goes on" in text]) == 1


def test_a_final_upload_that_failed_is_made_up_for(
    images: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints are of the last iteration; it is the second one that must not get lost."""
    original = MlflowClient.log_artifact
    failing = True

    def refuse_the_last(client: MlflowClient, run_id: str, path: str, folder: str) -> None:
        if failing and "bnps-" in path:
            raise ConnectionError("Connection refused")
        original(client, run_id, path, folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse_the_last)
    with pytest.raises(TrackingError, match="cannot upload the checkpoint bnps-"):
        run(images, "--save-dir", "models")
    failing = False
    again = run(images, "--save-dir", "models")
    latest = json.loads(client.get_run(again.run_id).data.tags["checkpoint.latest"])
    assert latest["path"] == "checkpoints/bnps-checkpoint-000012.pth.tar"


def test_an_outage_when_stopped_does_not_hide_the_signal(images: Path, outage: Outage) -> None:
    def pull(phase: str, done: int) -> None:
        if (phase, done) == ("training", 5):
            outage.on = True
            signal.raise_signal(signal.SIGTERM)

    reporter = Reporter(pull)
    with StopFlag() as stop:
        summary = run(images, "--save-dir", "models", reporter=reporter, stop=stop)
    assert summary.result.stopped_by == signal.SIGTERM
    assert any("were not delivered" in text for text in reporter.warnings)
    outage.on = False
    assert run(images, "--save-dir", "models").run_id == summary.run_id


def test_an_outage_at_the_end_is_an_error_that_says_so(
    images: Path, client: MlflowClient, outage: Outage, uninterrupted: Any
) -> None:
    def switch(phase: str, done: int) -> None:
        outage.on = outage.on or (phase, done) == ("training", 9)

    with pytest.raises(TrackingError, match="were not delivered, the checkpoints on the disk are complete"):
        run(images, "--save-dir", "models", reporter=Reporter(switch))
    assert list_checkpoints(Path("models"))[0].name == "bnps-checkpoint-000012.pth.tar"
    outage.on = False
    resumed = run(images, "--save-dir", "models")  # brings the final checkpoint to the run
    latest = json.loads(client.get_run(resumed.run_id).data.tags["checkpoint.latest"])
    assert latest["path"] == "checkpoints/bnps-checkpoint-000012.pth.tar"


# ---------------------------------------------------------------- signals


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        stop.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_first_signal_is_announced() -> None:
    heard: list[str] = []
    with StopFlag(heard.append) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["SIGTERM"]
    assert stop.signum == signal.SIGTERM


def test_summary_is_plain(images: Path) -> None:
    document: Mapping[str, Any] = run(images).to_dict()
    assert set(document) == {"run_id", "iters", "epoch", "loss", "val_top1", "val_top5", "checkpoint", "save_dir"}
    json.dumps(document)
