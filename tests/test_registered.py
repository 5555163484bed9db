"""Networks that other packages register: trained, resumed, evaluated and saved like ours, and wrong ones refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shufflenet_mlflow import create_model, list_models, load_checkpoint, read_checkpoint, save_checkpoint
from shufflenet_mlflow.errors import ConfigError, MismatchError, ModelError
from shufflenet_mlflow.models.loaded import model_from_payload
from shufflenet_mlflow.models.parts import frozen_modules
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.training.optimizer import make_optimizer
from tests.support.command_line import Invoke
from tests.support.plugins import NETWORKS, install

SmallTrain = Callable[..., dict[str, Any]]


@pytest.fixture
def own_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path, monkeypatch)


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def uninstall(site: Path) -> None:
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])

    return uninstall


def test_a_registered_network_is_made_and_saved(own_nets: Path) -> None:
    assert [name for name in list_models() if name in ("tiny", "tv/")] == ["tiny"]
    assert "own_nets" not in sys.modules
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = create_model("tiny", 3, width=4)
    assert torch.equal(torch.rand(1), expected)  # random numbers are left alone
    model = create_model("tiny", 3, width=4)
    payload = read_checkpoint(save_checkpoint({"model": model}, 1, directory="saved"))
    assert payload["model"] == {"name": "tiny", "kwargs": {"num_classes": 3, "width": 4}, "package": "own-nets 1.0"}
    loaded = model_from_payload(payload, "x")
    assert loaded.spec == ModelSpec("tiny", arguments={"width": 4})
    assert loaded.preprocess.to_dict() == payload["preprocess"]
    assert (payload["preprocess"]["mean"], loaded.preprocess.input_size) == ([0.5, 0.4, 0.3], 32)
    assert all(map(torch.equal, loaded.module.state_dict().values(), model.state_dict().values()))


def test_its_classifier_is_found_and_its_parts_are_complete(own_nets: Path) -> None:
    """Also parameters of the network itself, and linear layers that are not the classifier."""
    model = create_model("tiny", 3)
    frozen = {parameter for module in frozen_modules(model, "backbone") for parameter in module.parameters()}
    assert {name for name, value in model.named_parameters() if value not in frozen} == {
        "classify.weight",
        "classify.bias",
    }
    optimizer = make_optimizer(model, lr=0.1, momentum=0.9, weight_decay=0.1, head_lr_factor=10.0)
    rates = {value: group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert rates == {value: 1.0 if name.startswith("classify") else 0.1 for name, value in model.named_parameters()}
    other = create_model("tiny", 5)
    report = load_checkpoint(other, model.state_dict(), strict=False, reset_head=True)
    assert report.reshaped == ("classify.weight", "classify.bias")
    with pytest.raises(MismatchError):
        load_checkpoint(create_model("tiny", 3, width=4), model.state_dict(), strict=False, reset_head=True)


def test_a_prefix_stands_for_many_networks(own_nets: Path) -> None:
    with torch.device("meta"):
        model = create_model("tv/squeezenet1_1", 3)  # its classifier is a convolution
    assert ModelSpec.of("tv/squeezenet1_1").traits.head == "classifier.1"  # type: ignore[union-attr]
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 3)
    with pytest.raises(
        ModelError, match="the entry point 'tv/' .* of own-nets 1.0 fails to build: ValueError: Unknown"
    ):
        create_model("tv/nothing")


def test_training_resuming_and_evaluating(
    own_nets: Path,
    small_train: SmallTrain,
    shufflenet: Invoke,
    images: Path,
    uninstalled: Callable[[Path], None],
) -> None:
    document = small_train("--model", "tiny", "--total-iters", 4, "--save-dir", "saved", "--head-lr-factor", 2)
    longer = small_train(
        "--model", "tiny", "--total-iters", 8, "--resume", "saved", "--new-run", "--save-dir", "longer"
    )
    assert longer["iters"] == 8
    path = document["checkpoint"]
    assert read_checkpoint(path)["preprocess"]["std"] == [0.2, 0.3, 0.4]
    evaluated = shufflenet("eval", path, "--val-dir", images / "val", "--log-to", "none", "--json")
    assert json.loads(evaluated.stdout)["top1"] == document["val_top1"]
    assert json.loads(shufflenet("predict", path, images / "val", "--json").stdout)[0]["path"]
    uninstalled(own_nets)
    message = "holds the network 'tiny', which no package registers here; own-nets 1.0 did"
    for words in (
        ("eval", path, "--val-dir", images / "val"),
        ("export", path),
        ("train", "--init-from", path),
        ("train", "--resume", path),
    ):
        result = shufflenet(*words)
        assert result.exit_code == 1 and message in result.output, result.output
    for words in (("checkpoints", "ls", "saved"), ("checkpoints", "verify", "saved")):
        result = shufflenet(*words)
        assert result.exit_code == 0 and "shufflenet eval" not in result.output, result.output


def test_models_lists_them_and_counts_on_request(own_nets: Path, shufflenet: Invoke) -> None:
    rows = {row["name"]: row for row in json.loads(shufflenet("models", "--json").stdout)}
    assert rows["tiny"]["family"] == "own-nets 1.0" and rows["tiny"]["parameters"] is None
    assert "tv/" in rows and "own_nets" not in sys.modules
    [row] = json.loads(shufflenet("models", "tiny", "--json").stdout)
    assert row["parameters"] == sum(value.numel() for value in create_model("tiny").parameters())
    assert row["macs"] == 16 * 16 * 8 * 27 + 8 * 16 + 16 * 1000  # at its own 32 pixels
    result = shufflenet("models", "tv/squeezenet1_1", "shufflenet_v2_x0_5")
    assert "1.24" in result.output and "1.37" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--freeze", 2), "--freeze (=2) needs the stages of tiny, which own-nets 1.0 does not name"),
        (("--layer-decay", 0.5), "--layer-decay (=0.5) needs the stages of tiny"),
        (("--mean-image", "mean.npy"), "tiny takes none, leave it out"),
        (("--choices", "1,2"), "tiny takes no choices; only shufflenet_oneshot does"),
        (("--model", "tv/resnet18", "--pretrained"), "has no argument 'pretrained'; leave it out"),
    ],
)
def test_options_that_it_cannot_take(
    words: tuple[object, ...], message: str, own_nets: Path, shufflenet: Invoke, images: Path
) -> None:
    model = () if "--model" in words else ("--model", "tiny")
    result = shufflenet("train", *model, "--train-dir", images / "train", "--val-dir", images / "val", *words)
    assert result.exit_code == 2 and message in result.output, result.output


def test_pretrained_weights_come_from_the_package(own_nets: Path) -> None:
    assert create_model("tiny", 3, pretrained=True).get_parameter("token")[0, 0].item() == 5.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("raises", "fails to build: RuntimeError: no luck$"),
        ("bare", "returns a TinyNet; it must return a module and its preprocessing, such as"),
        ("strange_input", "there is no mode 'rgb'"),
        ("headless", "no layer of wrong has a weight with num_classes rows"),
        ("lazy", "has lazy layers, whose shapes only the first images would decide; give them their sizes"),
        ("NUMBER", "is a int, not a function"),
        ("nothing", "cannot be imported: AttributeError"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("TinyNet", "cannot be called with num_classes: missing a required argument: 'width'"),
    ],
)
def test_packages_that_are_wrong(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke
) -> None:
    install(tmp_path, monkeypatch, {**NETWORKS, "wrong": value})
    with pytest.raises(ModelError, match=message) as raised:
        create_model("wrong", 3)
    assert "the entry point 'wrong'" in str(raised.value) and "of own-nets 1.0" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert create_model("tiny", 3) is not None and shufflenet("models").exit_code == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "one_output",
            "in evaluation, and 3 classes; it must return logits of shape (2, 3)",
        ),
        (
            "viewing",
            "fails on images of 32x32 pixels, channels last, in evaluation: RuntimeError: view size",
        ),
    ],
)
def test_networks_that_cannot_be_trained(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke
) -> None:
    install(tmp_path, monkeypatch, {"wrong": value})
    result = shufflenet("train", "--model", "wrong", "--input-size", 32)
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
    assert not Path("models").exists()


def test_a_function_that_needs_numbers_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"numbers": "needs_numbers"})
    assert ModelSpec.of("numbers").traits is not None


def test_names_that_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke) -> None:
    ours = "shufflenet_v2_x0_5"
    install(tmp_path, monkeypatch, {**NETWORKS, ours: "raises", "torchvision/x": "raises", "a b": "raises"})
    install(tmp_path, monkeypatch, {"tiny": "tiny"}, package="other-nets")
    assert create_model(ours, 3) is not None
    with pytest.raises(ModelError, match="there is no network 'torchvision/x'"):
        create_model("torchvision/x")
    with pytest.raises(ModelError, match="registered by other-nets 1.0 and own-nets 1.0; uninstall all but one"):
        create_model("tiny", 3)
    with torch.device("meta"):
        assert isinstance(create_model("tv/resnet18", 3), nn.Module)  # another network is not disturbed
    result = shufflenet("models")
    assert result.exit_code == 0
    assert result.output.count("is left out") == 3


def test_arguments_must_be_plain(own_nets: Path) -> None:
    with pytest.raises(ModelError, match="arguments of tiny"):
        create_model("tiny", 3, width=object())
    with pytest.raises(ModelError, match="cannot be called with num_classes, depth: got an unexpected keyword"):
        create_model("tiny", 3, depth=3)
    with pytest.raises(ModelError, match="takes no width; only another network does"):
        create_model("shufflenet_v2_x0_5", 3, width=3)
    with pytest.raises(ConfigError):
        create_model("tiny", 3, preprocess="nothing")


def test_a_network_that_fixes_the_size_of_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke
) -> None:
    install(tmp_path, monkeypatch, {"fixed": "fixed_batch"})
    save_checkpoint({"model": create_model("fixed", 3)}, 1, directory="saved")
    for form in ("pt2", "onnx"):
        result = shufflenet("export", "saved", "--format", form)
        assert result.exit_code == 1
        assert "Error: fixed cannot be exported: its code fixes the number of images, as len(x) does" in result.stderr
        assert result.stderr.count("\n") == 1


def test_another_version_of_the_package_is_named(
    own_nets: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    payload = read_checkpoint(save_checkpoint({"model": create_model("tiny", 3)}, 1, directory="saved"))
    model_from_payload(payload, "x")
    assert "was that of" not in caplog.text
    metadata = own_nets / "own_nets-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 2.0"))
    model_from_payload(payload, "x")
    assert "'tiny' was that of own-nets 1.0 when its checkpoint was written, and is that of own-nets 2.0" in caplog.text
