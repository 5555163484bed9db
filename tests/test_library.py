"""The functions for scripts: train, load, evaluate and predict as the commands do."""

import json
import os
import re
import threading
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from shufflenet_mlflow import (
    Callback,
    LoadedModel,
    TrainConfig,
    Trainer,
    create_model,
    evaluate,
    load_model,
    predict,
    read_checkpoint,
    save_checkpoint,
    train,
)
from shufflenet_mlflow.config import FIXED_DEFAULTS
from shufflenet_mlflow.errors import BadImageError, ConfigError, DataError, ShuffleNetError
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows.bench import bare_training
from tests.support.command_line import Invoke
from tests.support.payloads import assert_equal_payloads


def small(images: Path, **changes: Any) -> dict[str, Any]:
    """Return the options of `small_options`, as arguments of `train`."""
    folders = {"train_dir": images / "train", "val_dir": str(images / "val")}
    sizes = {"input_size": 32, "batch_size": 8, "total_iters": 12, "lr": 0.02, "workers": 0}
    intervals = {"display_interval": 2, "val_interval": 4, "save_interval": 5}
    return {**folders, **sizes, **intervals, "no_log_models": True, "progress": False, **changes}


class Failing(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, trainer: Trainer) -> None:
        if trainer.iters == self.at:
            raise LookupError("mine")


class Seen(Callback):
    def __init__(self) -> None:
        self.checkpoints: list[str] = []
        self.metrics: Mapping[str, float] = {}

    def on_validation(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics
        trainer.log({"mine/accuracy": metrics["val/top1"]})

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        assert path.exists()
        assert trainer.is_leader
        self.checkpoints.append(path.name)


# ---------------------------------------------------------------- train


def test_a_run_that_a_callback_ended_goes_on_as_the_command_would(
    images: Path, client: MlflowClient, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with mlflow.start_run() as parent, pytest.raises(LookupError, match="mine"):
        train(TrainConfig(seed=0), callbacks=[Failing(7)], **small(images, experiment="mine"))
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert json.loads(run.data.tags["checkpoint.latest"])["iters"] == 7
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"

    seen = Seen()
    summary = train(resume=run.info.run_id, callbacks=[seen], progress=False, no_log_models=True)
    assert (summary.run_id, summary.iters, summary.epoch) == (run.info.run_id, 12, 3)
    names = ["checkpoint-000010.pth.tar", "checkpoint-000012.pth.tar", "bnps-checkpoint-000012.pth.tar"]
    assert seen.checkpoints == names
    assert summary.val_top1 == seen.metrics["val/top1"] == summary.validation["val/top1"]
    history = client.get_metric_history(run.info.run_id, "mine/accuracy")
    assert [point.step for point in history] == [8, 12]
    assert summary.checkpoint is not None
    varying = ("run_id", "created_at", "config")
    last = read_checkpoint(summary.checkpoint)
    assert_equal_payloads(
        {key: value for key, value in last.items() if key not in varying},
        {key: value for key, value in uninterrupted[0].items() if key not in varying},
    )
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"

    # What `read_checkpoint` returns can be saved again, and resumed from.
    middle = read_checkpoint(summary.save_dir / "checkpoint-000010.pth.tar")
    copy = save_checkpoint(middle, middle["iters"], directory="copy")
    again = read_checkpoint(copy)
    assert_equal_payloads(
        {key: value for key, value in again.items() if key != "created_at"},
        {key: value for key, value in middle.items() if key != "created_at"},
    )
    fork = train(resume=copy, new_run=True, save_dir="fork", progress=False, no_log_models=True)
    assert fork.run_id != summary.run_id
    assert fork.checkpoint is not None
    for key in ("state_dict", "optimizer_state_dict"):
        assert_equal_payloads(read_checkpoint(fork.checkpoint)[key], last[key], key)


@pytest.mark.long
def test_two_trainings_in_a_thread(images: Path, client: MlflowClient) -> None:
    """One is a child of no run, and one is ended by a callback: the run is complete, and says why."""

    class Enough(Callback):
        def on_validation(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
            trainer.stop("enough")

    found: list[Any] = []
    options = small(images, val_interval=1, no_system_metrics=True)

    def two() -> None:
        found.append(train(**{**options, "total_iters": 1}))
        found.append(train(callbacks=[Enough()], **options))

    thread = threading.Thread(target=two)
    thread.start()
    thread.join()
    runs = [client.get_run(summary.run_id) for summary in found]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert "mlflow.parentRunId" not in runs[0].data.tags
    assert found[1].iters == 1
    assert "ended by a callback: enough" in runs[1].data.tags["mlflow.note.content"]
    complete = train(resume=found[1].run_id, progress=False)
    assert complete.was_complete
    assert complete.result.stop_reason == "enough"
    assert not complete.result.ended_by_patience


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "similar": ({"momentm": 0.9}, "there is no option 'momentm'; did you mean momentum?"),
    "of the run": ({"save_dri": "x"}, "there is no option 'save_dri'; did you mean save_dir?"),
    "other": ({"learning_rate": 1}, r"no option 'learning_rate'; `help\(TrainConfig\)` lists them"),
    "value": ({"lr": 0}, r"--lr \(=0\) must be above 0"),
    "type": ({"lr": "fast"}, r"--lr \(='fast'\) must be of type float"),
    "both": ({"epochs": 1, "total_iters": 1}, r"--epochs \(=1\) and --total-iters \(=1\) exclude each other"),
    "network": ({"model": "resnet"}, "there is no network 'resnet'"),
    "dict": ({"config": {"lr": 1}}, "must be a TrainConfig; TrainConfig.from_dict"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_named_before_anything_is_done(wrong: str, workplace: Path) -> None:
    options, says = WRONG[wrong]
    with pytest.raises(ShuffleNetError, match=says):
        train(**options)
    assert [path.name for path in workplace.iterdir()] == ["mlflow.db"]


# ---------------------------------------------------------------- TrainConfig


def test_defaults_are_those_of_the_command(cache_dir: Path) -> None:
    """A configuration of its own defaults asks for nothing, and the command decides the same values."""
    assert TrainConfig().given() == {}
    plan, _ = bare_training({}, cache_dir, JobContext.alone(LoggingReporter(), StopFlag()))
    decided = plan.config.to_dict()
    assert {name: decided[name] for name in FIXED_DEFAULTS} == FIXED_DEFAULTS
    assert TrainConfig().batch_size == 64
    assert decided["total_iters"] == TrainConfig.from_dict(decided).total_iters == TrainConfig(**decided).total_iters


def test_configurations_are_checked_copied_and_stored() -> None:
    config = TrainConfig(train_dir=Path("pets"), choices=[0, 1], lr=1)  # type: ignore[arg-type]
    assert (config.train_dir, config.choices) == ("pets", "0,1")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(lr=0.5).given() == {"train_dir": "pets", "choices": "0,1", "lr": 0.5}
    for wrong, says in (({"seed": -1}, r"--seed \(=-1\)"), ({"batch_size": 1}, "two images"), ({"amp": "fp8"}, "fp8")):
        with pytest.raises(ConfigError, match=says):
            config.replace(**wrong)
        with pytest.raises(ConfigError, match=says):
            TrainConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean seed"):
        config.replace(sed=1)


# ---------------------------------------------------------------- load_model, predict, evaluate


@pytest.fixture
def weights(uninterrupted: Any, tmp_path: Path) -> Path:
    return save_checkpoint(uninterrupted[0], 12, directory=tmp_path / "weights")


def test_a_loaded_network_answers_as_the_commands_do(weights: Path, images: Path, shufflenet: Invoke) -> None:
    model = load_model(weights)
    assert isinstance(model, LoadedModel)
    assert not model.module.training
    assert (model.classes, model.iters, model.config["lr"]) == (tuple(model.labels), 12, 0.02)
    folder = images / "val"
    printed = json.loads(shufflenet("predict", weights, folder, "--top", 2, "--json").stdout)
    assert [prediction.to_dict() for prediction in model.predict(folder, top=2)] == printed
    assert [prediction.to_dict() for prediction in predict(weights, folder, top=2)] == printed

    # The same image in every form has the same answer, and the module and its preprocessing give it, too.
    path = Path(printed[0]["path"])
    forms = [str(path), path, path.read_bytes(), BytesIO(path.read_bytes()), Image.open(path)]
    pixels = np.array(Image.open(path).convert("RGB"))
    forms += [pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    answers = model.predict(forms, top=2)
    expected = tuple((row["label"], row["probability"]) for row in printed[0]["top"])
    assert {prediction.top for prediction in answers} == {expected}
    assert [prediction.path for prediction in answers][:3] == [str(path), str(path), "image 2"]
    one, batch = model.preprocess(path), model.preprocess(forms)
    assert one.shape == (3, 32, 32)
    assert all(torch.equal(row, one) for row in batch)
    with torch.inference_mode():
        probabilities = model.module(batch[:1]).softmax(1)[0]
    assert model.classes[int(probabilities.argmax())] == printed[0]["label"]

    result, document = evaluate(model), json.loads(shufflenet("eval", weights, "--json").stdout)
    assert (result.top1, result.loss, result.n) == (document["top1"], document["loss"], document["n"])
    assert result.classes == document["classes"]
    assert evaluate(weights, folder, batch_size=2).metrics()["top1"] == result.top1


def test_a_run_id_means_the_best(images: Path) -> None:
    summary = train(**small(images, total_iters=3, val_interval=1, no_system_metrics=True))
    assert summary.best is not None
    model = load_model(f"runs:/{summary.run_id}")
    assert model.iters == load_model(f"runs:/{summary.run_id}@best").iters == summary.best["iters"]
    assert model.run_id == summary.run_id
    assert summary.checkpoint is not None
    assert load_model(f"{summary.run_id}@latest").checkpoint.name == summary.checkpoint.name


def test_odd_images_are_named(weights: Path, tmp_path: Path) -> None:
    model = load_model(weights)
    (tmp_path / "cat.jpg").write_bytes(b"no image")
    pixels = np.zeros((9, 7, 3), np.uint8)
    odd: list[tuple[Any, str]] = [
        (tmp_path / "cat.jpg", "cat.jpg"),
        ([pixels, pixels / 255], "image 1' is not a readable image .an array of float64, not uint8"),
        (pixels.transpose(2, 0, 1), r"shape \(3, 9, 7\), not \(height, width, 3\)"),
        (torch.zeros(9, 7, 3, dtype=torch.uint8), r"tensor of shape \(9, 7, 3\), not \(3, height, width\)"),
        (7, "int is no path, bytes, file, PIL image or array"),
        (b"", "image 0"),
    ]
    for images, says in odd:
        with pytest.raises(BadImageError, match=says):
            model.predict(images)
        with pytest.raises(BadImageError, match=says.replace("1'", "1").removeprefix("image 1' is")):
            model.preprocess(images)
    with pytest.raises(DataError, match="does not exist"):
        model.predict("nowhere.jpg")
    with pytest.raises(DataError, match="does not exist"):
        model.predict("-")
    assert model.predict([]) == []
    assert [len(model.predict(fine)) for fine in (pixels[:, :, 0], np.stack([pixels, pixels]))] == [1, 2]
    assert [found.path for found in model.predict([pixels, b"", pixels], on_bad_image="skip")] == ["image 0", "image 2"]
    with pytest.raises(TypeError, match="device cannot be given"):
        evaluate(model, device="cpu")
    with pytest.raises(ConfigError, match=r"top \(=0\) must be"):
        model.predict(pixels, top=0)


@pytest.mark.parametrize("top", [0, 1.5, "2", None, True])
def test_labels_per_image_are_a_whole_number(top: Any, weights: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"top (={top!r}) must be a whole number, at least 1")):
        load_model(weights).predict(Image.new("RGB", (40, 40)), top=top)


def test_an_image_without_pixels_is_named(weights: Path) -> None:
    with pytest.raises(BadImageError, match="'image 0' is not a readable image \\(0x0 pixels: it is empty\\)"):
        load_model(weights).predict(Image.new("RGB", (0, 0)))


def test_released_weights_need_the_name_of_their_network(tmp_path: Path) -> None:
    path = save_checkpoint({"state_dict": create_model("shufflenet_v2_x0_5", 5).state_dict()}, 1, directory=tmp_path)
    with pytest.raises(ConfigError, match="does not name its network; it fits --model shufflenet_v2_x0_5"):
        load_model(path)
    model = load_model(path, model="shufflenet_v2_x0_5", input_size=32)
    assert (model.classes, model.config, model.run_id) == (("0", "1", "2", "3", "4"), {}, None)
    with pytest.raises(ConfigError, match="--val-dir is missing"):
        evaluate(model)
