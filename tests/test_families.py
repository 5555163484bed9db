"""Training, resuming and evaluating each family, with weights and options of every origin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from shufflenet_mlflow import create_model, load_checkpoint
from shufflenet_mlflow.checkpoints.manifest import manifest_path
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config import format_numbers, parse_numbers
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.errors import ConfigError, ModelError, UnsafeCheckpointError
from shufflenet_mlflow.models import oneshot, shufflenet_v2_exlarge, shufflenet_v2_large
from shufflenet_mlflow.models.auxiliary import DeeplySupervised
from shufflenet_mlflow.training.loss import AUXILIARY_WEIGHTS, make_loss, training_loss
from shufflenet_mlflow.training.recipe import get_recipe
from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images
from tests.support.original_files import FAMILIES, write_original
from tests.support.payloads import Hostile, assert_equal_payloads

SmallTrain = Callable[..., dict[str, Any]]

SHORT = ("--total-iters", 3, "--save-interval", 2, "--val-interval", 2, "--display-interval", 1)
"""Iteration 2 leaves a checkpoint to resume from; the end leaves two more."""


def train_interrupted(
    small_train: SmallTrain, folder: Path, *arguments: object
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Train, delete all checkpoints except the first, and resume from that in a new run.

    Returns:
        What both commands printed, and the last payload of the first.
    """
    whole = small_train(*SHORT, "--save-dir", folder, *arguments)
    expected = read_checkpoint(whole["checkpoint"])
    for path in folder.glob("*checkpoint-000003*"):
        path.unlink()
    resumed_run = small_train("--resume", folder, "--new-run", "--save-dir", f"{folder}-again", *SHORT, *arguments)
    return whole, resumed_run, expected


# ---------------------------------------------------------------- every family trains


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if index else []) for index, name in enumerate(FAMILIES)]
)
def test_each_family_trains_and_resumes_bit_for_bit(name: str, small_train: SmallTrain, shufflenet: Invoke) -> None:
    whole, resumed_run, expected = train_interrupted(small_train, Path("models"), "--model", name, "--lr", 0.001)
    assert np.isfinite(whole["loss"])
    resumed = read_checkpoint(resumed_run["checkpoint"])
    for key in ("state_dict", "optimizer_state_dict", "rng_state", "metrics", "loss"):
        assert_equal_payloads(resumed[key], expected[key], key)
    assert expected["model"] == {"name": name, "kwargs": {"num_classes": 3}}
    assert all(tensor.isfinite().all() for tensor in expected["state_dict"].values())
    evaluated = shufflenet("eval", resumed_run["checkpoint"], "--json")
    assert json.loads(evaluated.stdout)["top1"] == whole["val_top1"]


def test_the_cost_of_a_network_stands_in_its_run(small_train: SmallTrain, client: MlflowClient) -> None:
    trained = small_train("--total-iters", 1)
    metrics = client.get_run(trained["run_id"]).data.metrics
    model = create_model("shufflenet_v2_x0_5", 3)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < metrics["macs"] < 2e6


def test_recipes_follow_the_papers() -> None:
    assert get_recipe("shufflenet_v2_plus_small").total_iters == 450_000
    large = get_recipe("shufflenet_v2_large")
    assert (large.batch_size, large.lr, large.total_iters, large.augment) == (256, 0.25, 600_000, "lighting")
    assert large.epochs == 120
    assert get_recipe("shufflenet_v1_x1_0_g3") == get_recipe("detnas_voc_fpn_300m") == get_recipe("shufflenet_v2_x0_5")


def test_lighting_is_in_what_is_trained_on(small_train: SmallTrain) -> None:
    """Nothing else differs between the two runs: crops, jitter and flips are the same."""
    plain = small_train("--total-iters", 1, "--augment", "release")
    lit = small_train("--total-iters", 1, "--augment", "lighting")
    assert plain["loss"] != lit["loss"]
    assert plain["loss"] == pytest.approx(lit["loss"], abs=0.1)


# ---------------------------------------------------------------- OneShot's choices and scales

CHOICES = format_numbers([3, 2, 1, 0] * 5)
SCALES = format_numbers([0.2, 0.4, 1.6, 1.0] * 5)


@pytest.mark.long
def test_any_network_of_the_search_space_trains(small_train: SmallTrain, shufflenet: Invoke) -> None:
    options = ("--model", "shufflenet_oneshot", "--choices", f"[{CHOICES.replace(',', ', ')}]", "--scales", SCALES)
    whole, resumed_run, expected = train_interrupted(small_train, Path("models"), *options)
    assert_equal_payloads(read_checkpoint(resumed_run["checkpoint"])["state_dict"], expected["state_dict"])
    assert expected["model"]["kwargs"] == {
        "num_classes": 3,
        "choices": [3, 2, 1, 0] * 5,
        "scales": [0.2, 0.4, 1.6, 1.0] * 5,
    }
    assert (expected["config"]["choices"], expected["config"]["scales"]) == (CHOICES, SCALES)
    weights = expected["state_dict"]
    assert weights["features.1.branch_main.3.weight"].shape == (12, 1, 7, 7)
    assert weights["features.2.branch_main.0.weight"].shape == (51, 32, 1, 1)
    evaluated = shufflenet("eval", resumed_run["checkpoint"], "--json")
    assert json.loads(evaluated.stdout)["top1"] == whole["val_top1"]
    refused = shufflenet("train", "--resume", "models", "--choices", CHOICES[::-1], "--scales", SCALES)
    assert (refused.exit_code, "changed --choices" in refused.stderr) == (1, True), refused.output
    refused = shufflenet("train", "--resume", "models", "--model", "shufflenet_v2_x0_5")
    assert (refused.exit_code, "changed --model (shufflenet_oneshot -> " in refused.stderr) == (1, True)


def test_the_published_choices_are_the_default() -> None:
    torch.manual_seed(0)
    one = create_model("shufflenet_oneshot", 3).state_dict()
    torch.manual_seed(0)
    other = create_model("shufflenet_oneshot", 3, choices=oneshot.CHOICES, scales=oneshot.SCALES).state_dict()
    assert_equal_payloads(dict(one), dict(other))
    choices_alone = create_model("shufflenet_oneshot", 3, choices=[0] * 20)
    assert choices_alone.features[0].branch_main[0].out_channels == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": [0] * 19}, "choices: there are 19, not 20, one per unit"),
        ({"choices": [0] * 19 + [4]}, "choices: 4 is none of 0, 1, 2"),
        ({"choices": [True] * 20}, "choices: True is none of"),
        ({"scales": [1.0] * 21}, "scales: there are 21, not 20"),
        ({"scales": [6] * 20}, "scales: 6 is not a factor of 0.03125 to 2.0; .* not their indices"),
        ({"scales": [float("nan")] * 20}, "scales: nan is not a factor"),
        ({"scales": [0.01] * 20}, "scales: 0.01 is not a factor"),
    ],
)
def test_impossible_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("shufflenet_oneshot", 3, **options)


def test_only_oneshot_has_choices() -> None:
    with pytest.raises(ModelError, match="shufflenet_v2_x0_5 takes no choices; only shufflenet_oneshot does"):
        create_model("shufflenet_v2_x0_5", 3, choices=[0] * 20)


@pytest.mark.parametrize("text", ["", "[]", "a,b", "1,2.5", "1;2"])
def test_invalid_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="--choices"):
        parse_numbers(text, "choices", int)


def test_lists_in_any_spelling() -> None:
    for text in ("0,1,2", "0 1 2", "[0, 1, 2]", " (0,\t1 ,2) "):
        assert parse_numbers(text, "choices", int) == (0, 1, 2)
    assert parse_numbers(format_numbers((0.2, 1.0)), "scales", float) == (0.2, 1.0)


# ---------------------------------------------------------------- auxiliary heads


@pytest.fixture(params=[shufflenet_v2_large, shufflenet_v2_exlarge], ids=["large", "exlarge"])
def short_giant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeeplySupervised:
    """Shorten Large and ExLarge to two units per stage, one of each kind."""
    monkeypatch.setattr(request.param, "STAGE_UNITS", (2, 2, 2, 2))
    torch.manual_seed(0)
    model: DeeplySupervised = request.param.build("", 5)
    return model


def test_training_yields_the_main_logits_and_those_of_the_heads_deepest_first(short_giant: DeeplySupervised) -> None:
    for size in (14, 28, 56):
        layer = getattr(short_giant, f"predict_{size}").fc
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, size)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        main, *auxiliary = short_giant.train()(images)
        assert [logits.unique().item() for logits in auxiliary] == [14, 28, 56]
        assert main.shape == (2, 5)
        assert isinstance(short_giant.eval()(images), torch.Tensor)


def test_the_heads_look_at_the_ends_of_the_first_three_stages(short_giant: DeeplySupervised) -> None:
    seen: dict[str, Any] = {}
    for index in range(3):
        short_giant.features[index].register_forward_hook(lambda _m, _i, out, key=index: seen.__setitem__(key, out))
    for size in (56, 28, 14):
        getattr(short_giant, f"predict_{size}").register_forward_pre_hook(
            lambda _m, inputs, key=size: seen.__setitem__(key, inputs[0])
        )
    with torch.no_grad():
        short_giant.train()(torch.randn(2, 3, 32, 32))
    for stage, size in enumerate((56, 28, 14)):
        assert seen[stage] is seen[size]


def test_every_weight_of_the_heads_is_trained(short_giant: DeeplySupervised) -> None:
    outputs = short_giant.train()(torch.randn(8, 3, 64, 64))
    loss, logits = training_loss(outputs, torch.arange(8) % 5, make_loss(0.1))
    loss.backward()
    assert loss.isfinite()
    assert logits is outputs[0]
    for name, parameter in short_giant.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_auxiliary_losses_are_weighed() -> None:
    labels = torch.tensor([0, 2])
    outputs = tuple(torch.randn(2, 3) for _ in range(4))
    loss_function = make_loss(0.1)
    loss, logits = training_loss(outputs, labels, loss_function)
    parts = [loss_function(each, labels).item() for each in outputs]
    assert loss.item() == pytest.approx(1.0 * parts[0] + 0.7 * parts[1] + 0.5 * parts[2] + 0.3 * parts[3])
    assert logits is outputs[0]
    assert AUXILIARY_WEIGHTS == (1.0, 0.7, 0.5, 0.3)
    assert training_loss(outputs[0], labels, loss_function)[0].item() == pytest.approx(parts[0])


# ---------------------------------------------------------------- fine-tuning


def weights_of(document: dict[str, Any]) -> dict[str, torch.Tensor]:
    state_dict: dict[str, torch.Tensor] = read_checkpoint(document["checkpoint"])["state_dict"]
    return state_dict


TINY = ("--total-iters", 1, "--lr", 1e-12, "--weight-decay", 0)
"""Training that leaves the weights as they were."""


def first_weights(document: dict[str, Any]) -> dict[str, torch.Tensor]:
    state_dict: dict[str, torch.Tensor] = read_checkpoint(Path(document["save_dir"]) / "checkpoint-000001.pth.tar")[
        "state_dict"
    ]
    return state_dict


def test_training_begins_with_an_original_file(small_train: SmallTrain, client: MlflowClient, tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = create_model("shufflenet_v1_x0_5_g3", 1000)
    path = write_original(tmp_path / "ShuffleNetV1.pth.tar", source, legacy=True)
    trained = small_train("--model", "shufflenet_v1_x0_5_g3", "--init-from", path, *TINY)
    weights = first_weights(trained)
    assert weights["classifier.0.weight"].shape == (3, 480)
    for key, parameter in source.named_parameters():
        if key != "classifier.0.weight":
            torch.testing.assert_close(weights[key], parameter.data, rtol=0, atol=1e-9)
    assert client.get_run(trained["run_id"]).data.params["init_from"] == str(path)
    assert trained["iters"] == 1


@pytest.mark.long
def test_training_begins_with_a_run_and_its_network(
    small_train: SmallTrain, client: MlflowClient, tmp_path: Path
) -> None:
    parent = small_train("--model", "shufflenet_oneshot", "--choices", CHOICES, "--save-dir", tmp_path / "parent")
    before = weights_of(parent)
    same = small_train("--init-from", parent["run_id"], *TINY)
    payload = read_checkpoint(same["checkpoint"])
    assert payload["model"]["kwargs"]["choices"] == [3, 2, 1, 0] * 5
    assert (payload["iters"], payload["run_id"]) == (1, same["run_id"])
    assert client.get_run(same["run_id"]).data.tags["init_from.run"] == parent["run_id"]
    torch.testing.assert_close(first_weights(same)["classifier.0.weight"], before["classifier.0.weight"])

    others = write_images(tmp_path / "others" / "train", classes=("cat", "cow", "dog")).parent
    write_images(others / "val", classes=("cat", "cow", "dog"), seed=1)
    folders = ("--train-dir", others / "train", "--val-dir", others / "val")
    tuned = first_weights(small_train("--init-from", f"runs:/{parent['run_id']}@best", *TINY, *folders))
    best = read_checkpoint(client_best(client, parent, tmp_path))["state_dict"]
    torch.testing.assert_close(tuned["conv_last.0.weight"], best["conv_last.0.weight"])
    assert not torch.allclose(tuned["classifier.0.weight"], best["classifier.0.weight"], atol=1e-4)


def client_best(client: MlflowClient, document: dict[str, Any], folder: Path) -> Path:
    """Return the path of the run's best checkpoint."""
    manifest = json.loads(client.get_run(document["run_id"]).data.tags["checkpoint.best"])
    return folder / "parent" / Path(manifest["path"]).name


def test_weights_alone_are_taken_over(small_train: SmallTrain, images: Path, shufflenet: Invoke) -> None:
    parent = small_train("--input-size", 64, "--total-iters", 1)
    words = ("--train-dir", images / "train", "--val-dir", images / "val", "--batch-size", 8, "--total-iters", 1)
    others = ("--workers", 0, "--no-log-models", "--json")
    result = shufflenet("train", *words, "--init-from", parent["run_id"], *others)
    assert result.exit_code == 0, result.output
    payload = read_checkpoint(json.loads(result.stdout)["checkpoint"])
    assert payload["preprocess"]["input_size"] == 64  # the size that they were trained with is the default
    assert (payload["iters"], payload["config"]["lr"]) == (1, 0.5 * 8 / 1024)


def test_a_configuration_of_before_the_option_counts_as_without_it(small_train: SmallTrain, shufflenet: Invoke) -> None:
    path = Path(small_train("--save-dir", "models")["checkpoint"])
    payload = read_checkpoint(path)
    for name in ("init_from", "pretrained", "choices", "scales", "mean_image"):
        del payload["config"][name]
    torch.save(payload, path)
    manifest_path(path).unlink()
    assert small_train("--resume", "models")["iters"] == 12
    for words in (["--init-from", "nowhere"], ["--pretrained"]):
        refused = shufflenet("train", "--resume", "models", "--new-run", "--save-dir", "fork", *words)
        assert refused.exit_code in (1, 2)
        assert f"changed {words[0]}" in refused.stderr or "no published weights" in refused.stderr


def test_repeating_the_command_resumes(
    small_train: SmallTrain, shufflenet: Invoke, images: Path, tmp_path: Path
) -> None:
    path = write_original(tmp_path / "model.pth.tar", create_model("shufflenet_v2_x0_5", 10))
    words = ("--model", "shufflenet_v2_x0_5", "--init-from", path, "--save-dir", "models")
    first = small_train(*words)
    path.unlink()  # needed no more
    assert small_train(*words)["run_id"] == first["run_id"]
    refused = shufflenet("train", *small_options(images), "--resume", "models", "--init-from", "models")
    assert refused.exit_code == 1
    assert "changed --init-from" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--init-from", "nowhere.pth.tar"], 1, "'nowhere.pth.tar' does not exist"),
        (["--init-from", "{file}"], 2, "does not name its network; it fits --model shufflenet_v2_x0_5"),
        (
            ["--init-from", "{file}", "--model", "shufflenet_v2_x1_0"],
            1,
            "fit shufflenet_v2_x1_0; it fits --model shufflenet_v2_x0_5",
        ),
        (["--init-from", "{file}", "--model", "shufflenet_v2_x0_6"], 2, "did you mean"),
        (["--init-from", "{file}", "--pretrained"], 2, "and --pretrained exclude each other"),
        (["--choices", CHOICES], 2, "needs --model shufflenet_oneshot"),
        (["--model", "shufflenet_v2_x0_5", "--scales", SCALES], 2, "shufflenet_v2_x0_5 takes no scales"),
        (["--model", "shufflenet_oneshot", "--choices", "1,2"], 2, "choices: there are 2, not 20"),
        (["--model", "shufflenet_oneshot", "--scales", "x"], 2, "--scales (=x) must be numbers"),
        (["--mean-image", "mean.npy"], 2, "is for shufflenet_v2_large; shufflenet_v2_x0_5 takes none"),
        (["--model", "shufflenet_v2_large", "--mean-image", "x.npy"], 1, "the mean image 'x.npy' does not exist"),
        (["--model", "shufflenet_v2_large", "--mean-image", "x.png"], 2, "must be a .npy file, or .xml"),
    ],
)
def test_invalid_initial_weights_are_one_line_and_leave_nothing(
    arguments: list[str],
    status: int,
    message: str,
    images: Path,
    shufflenet: Invoke,
    client: MlflowClient,
    tmp_path: Path,
) -> None:
    path = write_original(tmp_path / "model.pth.tar", create_model("shufflenet_v2_x0_5", 10))
    words = [word.replace("{file}", str(path)) for word in arguments]
    result = shufflenet("train", *small_options(images), *words)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr
    assert result.stderr.count("\n") <= result.exit_code
    assert client.get_experiment_by_name("shufflenet") is None
    assert not Path("models").exists()


# ---------------------------------------------------------------- evaluating files of any origin


def test_an_original_file_is_evaluated(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = write_original(tmp_path / "checkpoint-000077.pth.tar", create_model("detnas_voc_fpn_300m", 1000))
    words = ("eval", path, "--model", "detnas_voc_fpn_300m", "--val-dir", images / "val", "--input-size", 64)
    result = shufflenet(*words, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["n"], document["iters"], document["run_id"]) == (15, 77, None)
    assert document["model"] == "detnas_voc_fpn_300m"
    [note] = [line for line in result.stderr.splitlines() if "does not name its classes" in line]
    assert "'blue' … 'red' are taken for 0 … 2 of its 1000; if these are other classes, the accuracies" in note


def test_an_original_file_gives_the_accuracy_of_its_network(
    small_train: SmallTrain, images: Path, shufflenet: Invoke, tmp_path: Path
) -> None:
    trained = small_train()
    model = create_model("shufflenet_v2_x0_5", 3)
    model.load_state_dict(weights_of(trained))
    path = write_original(tmp_path / "model.pkl", model, bare=True, legacy=True)
    words = ("eval", path, "--model", "shufflenet_v2_x0_5", "--val-dir", images / "val", "--input-size", 32, "--json")
    assert json.loads(shufflenet(*words).stdout)["top1"] == trained["val_top1"]


def test_a_file_for_other_networks_or_folders_is_refused(
    small_train: SmallTrain, images: Path, shufflenet: Invoke, tmp_path: Path
) -> None:
    path = write_original(tmp_path / "model.pth.tar", create_model("shufflenet_v2_x0_5", 2))
    model, val = ("--model", "shufflenet_v2_x0_5"), ("--val-dir", images / "val")
    for words, message in (
        ([*val], "it fits --model shufflenet_v2_x0_5"),
        ([*model], "--val-dir is missing"),
        ([*model, *val], "has 3 classes, the checkpoint '"),
        (
            ["--model", "shufflenet_v2_x1_0", *val],
            "fit shufflenet_v2_x1_0; it fits --model shufflenet_v2_x0_5",
        ),
        ([*model, *val, "--input-size", 50], "--input-size (=50) must be a multiple of 32"),
    ):
        result = shufflenet("eval", path, *words)
        assert result.exit_code in (1, 2)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    checkpoint = small_train()["checkpoint"]
    result = shufflenet("eval", checkpoint, "--model", "shufflenet_v1_x0_5_g3")
    assert (result.exit_code, "holds shufflenet_v2_x0_5, not --model" in result.stderr) == (2, True)
    assert shufflenet("eval", checkpoint, "--model", "shufflenet_v2_x0_5", "--input-size", 64).exit_code == 0
    assert shufflenet("eval", checkpoint, "--input-size", 0).exit_code == 2


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_that_would_run_code_never_does(legacy: bool, images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pth.tar", tmp_path / "it ran"
    model = create_model("shufflenet_v2_x0_5", 3)
    state_dict = {**model.state_dict(), "classifier.0.weight": Hostile(marker)}
    torch.save({"state_dict": state_dict}, path, _use_new_zipfile_serialization=not legacy)
    for options in ({"strict": True}, {"strict": False, "reset_head": True}):
        with pytest.raises(UnsafeCheckpointError, match="it holds a posix.mkdir"):
            load_checkpoint(model, path, **options)
    for words in (
        ["eval", path, "--model", "shufflenet_v2_x0_5", "--val-dir", images / "val"],
        ["train", *small_options(images), "--model", "shufflenet_v2_x0_5", "--init-from", path],
    ):
        result = shufflenet(*words)
        assert (result.exit_code, "is refused: it holds a posix.mkdir" in result.stderr) == (1, True), result.output
    assert not marker.exists()


# ---------------------------------------------------------------- the mean image, on a short Large


@pytest.fixture
def short_large(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Return options that train Large with few and narrow units."""
    monkeypatch.setattr(shufflenet_v2_large, "STAGE_UNITS", (2, 2, 2, 2))
    monkeypatch.setattr(shufflenet_v2_large, "STAGE_WIDTHS", (32, 16, 16, 16))
    monkeypatch.setattr(shufflenet_v2_large, "LAST_WIDTH", 64)
    return ("--model", "shufflenet_v2_large", "--lr", 0.0001)


def test_the_mean_image_travels_in_the_checkpoint(
    short_large: tuple[object, ...], small_train: SmallTrain, images: Path, shufflenet: Invoke
) -> None:
    result = shufflenet("data", "mean", images / "train", "--input-size", 32, "--output", "mean.xml", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["n"], document["input_size"], document["mean_image"]) == (36, 32, "mean.xml")
    arguments = (*short_large, "--mean-image", "mean.xml")
    whole, resumed_run, payload = train_interrupted(small_train, Path("models"), *arguments)
    assert payload["config"]["augment"] == "lighting"
    assert whole["loss"] > 2  # four losses of about log 3, weighed; the main one alone would be about 1.1
    assert payload["preprocess"]["mode"] == "bgr255_mean"
    mean = payload["preprocess"]["mean_image"]
    assert mean.shape == (3, 32, 32)
    assert mean.mean((1, 2)).tolist() == pytest.approx(document["mean_bgr"], abs=1e-3)
    resumed = read_checkpoint(resumed_run["checkpoint"])
    assert_equal_payloads(resumed["state_dict"], payload["state_dict"])
    assert_equal_payloads(resumed["preprocess"], payload["preprocess"])

    Path("mean.xml").unlink()  # needed no more, nor by the same command
    assert small_train("--resume", "models-again", "--lr", 0.0001, *SHORT)["run_id"] == resumed_run["run_id"]
    assert small_train("--save-dir", "models-again", *arguments, *SHORT)["run_id"] == resumed_run["run_id"]
    tuned = read_checkpoint(small_train("--init-from", "models-again", *TINY)["checkpoint"])
    assert tuned["preprocess"] == Preprocess("bgr255_mean", 32).to_dict()  # weights only
    evaluated = json.loads(shufflenet("eval", "models-again", "--json").stdout)
    assert evaluated["top1"] == whole["val_top1"]

    np.save("other.npy", np.full((32, 32, 3), 100, np.float32))
    refused = shufflenet("train", "--resume", "models-again", "--mean-image", "other.npy", "--json")
    assert refused.exit_code == 1
    assert "--mean-image is not the one that the run began with" in refused.stderr
    other = json.loads(shufflenet("eval", "models-again", "--mean-image", "other.npy", "--json").stdout)
    assert other["loss"] != evaluated["loss"]
    wrong_size = shufflenet("eval", "models-again", "--input-size", 64)
    assert wrong_size.exit_code == 2
    assert "the mean image has 32x32 pixels, the input 64x64; `shufflenet data mean DIR" in wrong_size.stderr


def test_released_weights_may_lack_the_heads(
    short_large: tuple[object, ...], small_train: SmallTrain, images: Path, shufflenet: Invoke, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = create_model("shufflenet_v2_large", 1000)
    weights = {f"module.{key}": value for key, value in source.state_dict().items() if "predict_" not in key}
    path = tmp_path / "ShuffleNetV2.Large.pth.tar"
    torch.save({"state_dict": weights}, path)
    words = ("--val-dir", images / "val", "--model", "shufflenet_v2_large", "--input-size", 32, "--json")
    result = shufflenet("eval", path, *words)
    assert result.exit_code == 0, result.output
    assert "missing: predict_56." in result.stderr
    tuned = first_weights(small_train("--init-from", path, *short_large, *TINY))
    torch.testing.assert_close(tuned["conv_last.conv.weight"], weights["module.conv_last.conv.weight"])
    assert tuned["fc.weight"].shape == (3, 64)
