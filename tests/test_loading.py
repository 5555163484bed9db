"""Loading weights into a network: files of any origin, strictly or tolerantly."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shufflenet_mlflow import create_model, load_checkpoint
from shufflenet_mlflow.checkpoints.loading import head_of
from shufflenet_mlflow.errors import CheckpointError, ConfigError, CorruptCheckpointError, MismatchError
from shufflenet_mlflow.models import oneshot
from shufflenet_mlflow.models.loaded import model_from_payload
from shufflenet_mlflow.models.spec import ModelSpec, fitting_models
from tests.support.original_files import FAMILIES, write_original
from tests.support.payloads import assert_equal_payloads


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (key, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_original_files_load(prefix: str, bare: bool, legacy: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = create_model("shufflenet_v2_x0_5", 10), create_model("shufflenet_v2_x0_5", 10)
    path = write_original(tmp_path / "model.pkl", source, prefix=prefix, bare=bare, legacy=legacy)
    report = load_checkpoint(target, path)
    assert len(report.loaded) == 337
    assert report.is_complete
    assert_same_weights(source, target)
    load_checkpoint(nn.DataParallel(target), torch.load(path, weights_only=True))


def test_strict_names_what_does_not_fit_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {**small_model().state_dict(), "3.weight": torch.ones(5, 4), "extra": torch.ones(1)}
    del wrong["0.bias"]
    with pytest.raises(
        MismatchError,
        match=r"1 missing: 0.bias; 1 unexpected: extra; 1 reshaped: 3.weight; 3.weight is \(5, 4\) in the checkpoint",
    ):
        load_checkpoint(model, {"state_dict": wrong})
    assert_equal_payloads(dict(model.state_dict()), before)


class WithAuxiliaryHead(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Linear(4, 4)
        self.fc = nn.Linear(4, classes)
        self.predict_14 = nn.Linear(4, classes)


def test_tolerant_lets_auxiliary_heads_lack_and_nothing_else() -> None:
    model, source = WithAuxiliaryHead(3), WithAuxiliaryHead(3).state_dict()
    without = {key: value for key, value in source.items() if not key.startswith("predict_")}
    with pytest.raises(MismatchError, match="predict_14.weight"):
        load_checkpoint(model, without)
    report = load_checkpoint(model, without, strict=False)
    assert report.missing == ("predict_14.weight", "predict_14.bias")
    assert torch.equal(model.fc.weight, source["fc.weight"])
    del without["features.bias"]
    with pytest.raises(MismatchError, match="1 missing: features.bias"):
        load_checkpoint(model, without, strict=False)


def test_tolerant_resets_a_head_of_another_width_only_when_asked() -> None:
    model = WithAuxiliaryHead(10)
    before = model.fc.weight.clone()
    source = {key: value for key, value in WithAuxiliaryHead(1000).state_dict().items() if "predict" not in key}
    with pytest.raises(MismatchError, match="2 reshaped: fc.weight, fc.bias"):
        load_checkpoint(model, source, strict=False)
    report = load_checkpoint(model, source, strict=False, reset_head=True)
    assert report.reshaped == ("fc.weight", "fc.bias")
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.features.weight, source["features.weight"])


@pytest.mark.parametrize("payload", [{}, {"epoch": 3}, {"state_dict": 5}, {"state_dict": {}}])
def test_dicts_without_weights_are_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_checkpoint(small_model(), payload)


@pytest.mark.parametrize("legacy", [True, False])
def test_files_saved_on_a_gpu_load_without_one(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source, target = create_model("shufflenet_v2_x0_5", 10), create_model("shufflenet_v2_x0_5", 10)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:3")  # as a GPU's tensors would have
        path = write_original(tmp_path / "model.pth.tar", source, legacy=legacy)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    assert load_checkpoint(target, path).is_complete
    assert_same_weights(source, target)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_every_family_load_key_for_key(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = create_model(name), create_model(name)
    report = load_checkpoint(target, write_original(tmp_path / "model.pth.tar", source))
    assert report.is_complete
    assert report.loaded == tuple(source.state_dict())
    assert_same_weights(source, target)


def test_the_files_of_large_and_detnas_hold_optimizer_state_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = create_model("detnas_voc_fpn_300m", 10), create_model("detnas_voc_fpn_300m", 10)
    optimizer = torch.optim.SGD(source.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    payload = {
        "state_dict": nn.DataParallel(source).state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": scheduler.state_dict(),
    }
    torch.save(payload, tmp_path / "checkpoint-000010.pth.tar")
    assert load_checkpoint(target, tmp_path / "checkpoint-000010.pth.tar").is_complete
    assert_same_weights(source, target)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_file_is_refused_and_the_model_untouched(legacy: bool, tmp_path: Path) -> None:
    model = create_model("shufflenet_v2_x0_5", 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = write_original(tmp_path / "model.pth.tar", create_model("shufflenet_v2_x0_5", 10), legacy=legacy)
    content = path.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 3):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError, match=r"model.pth.tar' is (corrupt|not a readable checkpoint)"):
            load_checkpoint(model, path)
    assert_equal_payloads(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(10, 1024, dtype=torch.complex64),
        torch.zeros(10, 1024, dtype=torch.uint8).view(torch.bits8),
        torch.zeros(1).expand(10**9, 1024),
        torch.randn(10, 1024).to_sparse(),
    ],
    ids=["complex", "bits", "pretended", "sparse"],
)
def test_tensors_that_are_no_weights_are_refused_and_the_model_untouched(weight: torch.Tensor, tmp_path: Path) -> None:
    model = create_model("shufflenet_v2_x0_5", 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    source = {**create_model("shufflenet_v2_x0_5", 10).state_dict(), "classifier.0.weight": weight}
    torch.save(source, tmp_path / "model.pth.tar")
    for checkpoint in (source, tmp_path / "model.pth.tar"):
        with pytest.raises(CheckpointError, match="'classifier.0.weight' in its state dict is not a plain tensor"):
            load_checkpoint(model, checkpoint)
    assert_equal_payloads(dict(model.state_dict()), before)


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = write_original(tmp_path / "model.pth.tar", create_model("shufflenet_v2_x0_5", 10))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # PyTorch does not notice
    with pytest.raises(CorruptCheckpointError, match="CRC"):
        load_checkpoint(create_model("shufflenet_v2_x0_5", 10), path)


def test_the_error_carries_the_whole_list() -> None:
    model = create_model("shufflenet_v2_x0_5", 10)
    with pytest.raises(MismatchError, match=r"and \d+ more") as caught:
        load_checkpoint(model, create_model("shufflenet_v1_x0_5_g3", 10).state_dict())
    report: Any = caught.value.report
    expected, found = set(model.state_dict()), set(create_model("shufflenet_v1_x0_5_g3", 10).state_dict())
    assert set(report.missing) == expected - found
    assert set(report.unexpected) == found - expected


@pytest.mark.parametrize("name", FAMILIES)
def test_1000_classes_against_10(name: str, tmp_path: Path) -> None:
    source, target = create_model(name, 1000), create_model(name, 10)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = write_original(tmp_path / "model.pth.tar", source)
    for options in ({"strict": True}, {"strict": False}):
        with pytest.raises(MismatchError, match=r"reshaped: .* is \(1000, \d+\) in the checkpoint, \(10, \d+\) here"):
            load_checkpoint(target, path, **options)
        assert_equal_payloads(dict(target.state_dict()), before)
    report = load_checkpoint(target, path, strict=False, reset_head=True)
    assert 1 <= len(report.reshaped) <= 2  # a classifier's weight, and its bias if it has one
    assert {key.rpartition(".")[0] for key in report.reshaped} == {head_of(target)}
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key] if key in report.reshaped else source.state_dict()[key]), key


def test_skipped_images_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = WithAuxiliaryHead(10)
    source = {key: value for key, value in WithAuxiliaryHead(1000).state_dict().items() if "predict" not in key}
    with caplog.at_level(logging.WARNING, "shufflenet_mlflow"):
        load_checkpoint(model, source, strict=False, reset_head=True)
    [line] = caplog.messages
    assert "2 tensors loaded; 2 missing: predict_14.weight, predict_14.bias; 2 reshaped: fc.weight, fc.bias" in line


def test_a_head_for_other_classes_of_the_same_number_is_left_alone_on_request() -> None:
    model, source = WithAuxiliaryHead(3), WithAuxiliaryHead(3).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_checkpoint(model, source, strict=False, reset_head="always")
    assert report.reset == ("fc.weight", "fc.bias", "predict_14.weight", "predict_14.bias")
    after = model.state_dict()
    assert torch.equal(after["features.weight"], source["features.weight"])
    for key in report.reset:
        assert torch.equal(after[key], before[key])
    with pytest.raises(ValueError, match="strict=False"):
        load_checkpoint(model, source, reset_head=True)


# ---------------------------------------------------------------- which network a file belongs to


def test_the_head_width_comes_from_the_file() -> None:
    for name in FAMILIES:
        network = model_from_payload(create_model(name, 7).state_dict(), "x", requested=ModelSpec(name))
        assert network.num_classes == 7
        assert (network.class_to_idx, network.preprocess.input_size) == (None, 224)


def test_a_file_that_names_no_network_needs_one() -> None:
    weights = create_model("shufflenet_v1_x0_5_g8", 7).state_dict()
    with pytest.raises(ConfigError, match="x does not name its network; it fits --model shufflenet_v1_x0_5_g8$"):
        model_from_payload(weights, "x")
    with pytest.raises(ConfigError, match="x does not name its network; pass --model NAME"):
        model_from_payload(small_model().state_dict(), "x")
    with pytest.raises(MismatchError, match="x does not fit .*; it fits --model shufflenet_v1_x0_5_g8$"):
        model_from_payload(weights, "x", requested=ModelSpec("shufflenet_v1_x0_5_g3"))


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_are_told_apart_by_their_keys(name: str) -> None:
    assert fitting_models(create_model(name, 3).state_dict()) == [name]


def own_payload(**model: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "state_dict": create_model("shufflenet_oneshot", 2).state_dict(),
        "model": {"name": "shufflenet_oneshot", "kwargs": {"num_classes": 2, **model}},
    }


def test_a_file_that_names_its_network_is_believed() -> None:
    assert model_from_payload(own_payload(), "x").spec == ModelSpec("shufflenet_oneshot")
    assert model_from_payload(own_payload(), "x", requested=ModelSpec("shufflenet_oneshot")).num_classes == 2
    published = ModelSpec.of("shufflenet_oneshot", oneshot.CHOICES, oneshot.SCALES)
    assert model_from_payload(own_payload(), "x", requested=published).num_classes == 2
    zeros, ones = [0] * 20, [1] * 20
    assert ModelSpec.of("shufflenet_oneshot", zeros) == ModelSpec.of("shufflenet_oneshot", zeros, ones)
    with pytest.raises(ConfigError, match="x holds shufflenet_oneshot, not --model shufflenet_v2_x0_5"):
        model_from_payload(own_payload(), "x", requested=ModelSpec("shufflenet_v2_x0_5"))
    with pytest.raises(ConfigError, match="leave --choices and --scales out"):
        model_from_payload(own_payload(), "x", requested=ModelSpec("shufflenet_oneshot", choices=(0,) * 20))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"pretrained": True}, r"the unknown arguments \['pretrained'\]"),
        ({"choices": 5}, "arguments are not lists"),
        ({"choices": [0, 1]}, "choices: there are 2, not 20"),
        ({"scales": ["a"] * 20}, "scales: 'a' is not a factor"),
    ],
)
def test_strange_networks_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_from_payload(own_payload(**model), "x")


def test_a_later_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="x has format 2, and 1 is the latest known here; upgrade"):
        model_from_payload({**own_payload(), "format_version": 2}, "x")
