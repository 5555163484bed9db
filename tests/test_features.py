"""Feature maps, and networks without a classifier."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shufflenet_mlflow import create_model, load_checkpoint, save_checkpoint
from shufflenet_mlflow.errors import CheckpointError, MismatchError
from shufflenet_mlflow.models import shufflenet_v2_exlarge, shufflenet_v2_large
from shufflenet_mlflow.models.parts import parts_of

SMALLEST = (
    *("shufflenet_v1_x0_5_g3", "shufflenet_v2_x0_5", "shufflenet_v2_x2_0", "shufflenet_v2_plus_small"),
    *("shufflenet_oneshot", "detnas_voc_retinanet_300m", "torchvision/shufflenet_v2_x0_5"),
)
"""One network of each family, and the one of V2 that has dropout; the giants are tested without weights."""


@pytest.mark.parametrize("name", SMALLEST)
def test_a_network_without_classes_returns_what_the_classifier_takes(name: str) -> None:
    model = create_model(name, num_classes=3).eval()
    features = create_model(name, num_classes=0).eval()
    load_checkpoint(features, {"state_dict": model.state_dict()}, strict=False)
    taken: list[torch.Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    layers[-1].register_forward_pre_hook(lambda _layer, inputs: taken.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits, pooled = model(images), features(images)
        assert torch.equal(pooled, taken[0])
        assert torch.equal(layers[-1](pooled), logits)
        map_NCHW = model.forward_features(images)  # type: ignore[operator]
        assert torch.equal(map_NCHW, features.forward_features(images))  # type: ignore[operator]
    assert map_NCHW.shape[0] == 2
    assert map_NCHW.shape[2:] == (2, 2)
    if name != "shufflenet_v2_plus_small":  # which has layers in between
        assert torch.allclose(map_NCHW.mean((2, 3)), pooled, atol=1e-6)


@pytest.mark.parametrize("name", [*SMALLEST, "shufflenet_v2_large", "shufflenet_v2_exlarge"])
def test_without_classes_only_the_tensors_of_classes_are_missing(name: str) -> None:
    with torch.device("meta"):
        model, features = create_model(name, num_classes=7), create_model(name, num_classes=0)
    whole, kept = model.state_dict(), features.state_dict()
    missing = whole.keys() - kept.keys()
    assert kept.keys() <= whole.keys()
    assert {key.split(".")[0] for key in missing} <= {"classifier", "fc", "predict_56", "predict_28", "predict_14"}
    assert [key for key, tensor in whole.items() if 7 in tensor.shape[:1] and key not in missing] == []
    assert parts_of(features)[-1] == []


@pytest.mark.parametrize("family", [shufflenet_v2_large, shufflenet_v2_exlarge], ids=["large", "exlarge"])
def test_the_giants_without_classes_have_no_auxiliary_outputs(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "STAGE_UNITS", (1, 1, 1, 1))
    monkeypatch.setattr(family, "STAGE_WIDTHS", (16, 16, 16, 16))
    monkeypatch.setattr(family, "FIRST_WIDTHS", (16, 16))
    model, features = family.build("", 3), family.build("", 0)
    features.num_classes = 0
    load_checkpoint(features, {"state_dict": model.state_dict()}, strict=False)
    images = torch.randn(2, 3, 32, 32)
    assert [logits.shape for logits in model.train()(images)] == [(2, 3)] * 4
    assert features.train()(images).shape[0] == 2
    with torch.inference_mode():
        assert torch.equal(model.eval().fc(features.eval()(images)), model(images))
        assert torch.equal(model.forward_features(images), features.forward_features(images))


def test_a_checkpoint_without_a_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    features = create_model("shufflenet_v2_x0_5", num_classes=0)
    path = save_checkpoint({"state_dict": features.state_dict()}, 1, directory=tmp_path)
    with pytest.raises(MismatchError, match="missing"):
        load_checkpoint(create_model("shufflenet_v2_x0_5", num_classes=3), path, strict=False)
    with pytest.raises(MismatchError, match="unexpected"):  # nothing is left out unless that is asked for
        load_checkpoint(features, {"state_dict": create_model("shufflenet_v2_x0_5", 3).state_dict()})

    from shufflenet_mlflow.models.loaded import model_from_payload
    from shufflenet_mlflow.models.spec import ModelSpec

    payload = {"state_dict": features.state_dict()}
    for requested in (None, ModelSpec("shufflenet_v2_x0_5")):
        with pytest.raises(CheckpointError, match=r"'a\.tar' holds the features of shufflenet_v2_x0_5 .*num_classes=0"):
            model_from_payload(payload, "'a.tar'", requested=requested)
