"""Fake quantisation and `train --qat`: it rounds as the exported file does, learns, resumes and is known everywhere."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mlflow import MlflowClient
from onnx import numpy_helper
from torch import nn

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.preprocess import ToInput
from shufflenet_mlflow.errors import CheckpointError, ConfigError
from shufflenet_mlflow.export import files
from shufflenet_mlflow.export.exported import open_exported
from shufflenet_mlflow.export.program import PixelsToLogits, example_pixels
from shufflenet_mlflow.models.fake_quantize import (
    SCALES,
    calibrate,
    fake_quantize,
    layers_of,
    rounded,
    scales_of,
)
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.training import run, run_until
from tests.test_export import network, short_networks
from tests.test_training_options import assert_same_state

MORE = ("shufflenet_v1_x0_5_g3", "shufflenet_v2_plus_small", "shufflenet_v2_large", "detnas_coco_fpn_300m")


@pytest.fixture(autouse=True)
def _short() -> Iterator[None]:
    with short_networks():
        yield


def _layers_of(module: nn.Module) -> int:
    """Return the number of convolutions and linear layers outside auxiliary heads."""
    kinds = (nn.Conv2d, nn.Linear)
    return sum(isinstance(part, kinds) and not name.startswith("predict_") for name, part in module.named_modules())


def quantised(ours: LoadedModel, pixels: Any) -> LoadedModel:
    """Return a copy with fake quantisation, calibrated on these pixels."""
    module = fake_quantize(copy.deepcopy(ours.module)).eval()
    calibrate(module, lambda: [ToInput(ours.preprocess, torch.device("cpu"))(pixels)])
    return replace(ours, module=module, spec=replace(ours.spec, fake_quantized=True))


# ---------------------------------------------------------------- the network


def test_rounding_is_that_of_onnx() -> None:
    """Halves to even, before the zero point is added; and its gradient stops where a number was cut off."""
    scale, zero = torch.tensor(0.5), torch.tensor(3.0)
    x = torch.tensor([-9.0, -1.5, -0.25, 0.25, 0.75, 2.0, 200.0], requires_grad=True)
    y = rounded(x, scale, zero, 0, 255)
    assert y.tolist() == [-1.5, -1.5, 0.0, 0.0, 1.0, 2.0, 126.0]
    assert torch.equal(y, rounded(x.detach(), scale, zero, 0, 255))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "name",
    [
        "shufflenet_v2_x0_5",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in (
                "shufflenet_v1_x0_5_g3",
                "shufflenet_v2_plus_small",
                "shufflenet_v2_large",
                "detnas_coco_fpn_300m",
            )
        ),
    ],
)
def test_a_network_keeps_its_tensors(name: str) -> None:
    ours, pixels = network(name), example_pixels(network(name), 8)
    theirs = quantised(ours, pixels)
    before, after = ours.module.state_dict(), theirs.module.state_dict()
    scales = scales_of(theirs.module)
    assert set(after) == set(before) | set(scales)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    layers = list(layers_of(theirs.module))
    assert len(layers) + 1 == _layers_of(ours.module)  # but the first
    assert all((value[0] > 0) & (value[0] != 1) for value in scales.values()), "a scale was not set"
    with torch.inference_mode():
        expected, found = (PixelsToLogits(model)(pixels) for model in (ours, theirs))
        settled = PixelsToLogits(replace(theirs, module=fuse_bn(theirs.module)))(pixels)
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(settled, found, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_channel_of_tiny_weights_keeps_its_bias() -> None:
    """Its bias, in units of weight times input, has more than 32 bits unless the weight's scale is larger."""
    ours = network()
    with torch.no_grad():
        ours.module.classifier[0].weight[0] *= 1e-12
        ours.module.classifier[0] = nn.Linear(ours.module.classifier[0].in_features, 3)
        ours.module.classifier[0].weight[0] *= 1e-12
        ours.module.classifier[0].bias.fill_(7.0)
    pixels = example_pixels(ours, 4)
    with torch.inference_mode():
        logits = PixelsToLogits(quantised(ours, pixels))(pixels)
    assert (logits[:, 0] - 7).abs().max() < 1e-3


# ---------------------------------------------------------------- training


OPTIONS = ("--lr", 0.01, "--batch-size", 8, "--augment", "none", "--val-interval", 4)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Write images whose colour is their class."""
    for part, count in (("train", 16), ("val", 24)):
        write_images(tmp_path / "colours" / part, per_class=count, seed=len(part))
    return tmp_path / "colours"


@pytest.fixture
def parent(client: MlflowClient, colours: Path) -> Any:
    return run(colours, "--lr", 0.02, "--total-iters", 40, "--batch-size", 16, "--augment", "none", "--save-dir", "p")


def test_fine_tuning_resumes_and_is_exported(
    colours: Path, parent: Any, client: MlflowClient, tmp_path: Path, shufflenet: Invoke
) -> None:
    """From the run's ID alone, bit for bit; the file then rounds as the checkpoint does, with the same scales."""
    options = (*OPTIONS, "--total-iters", 12)
    qat = ("--qat", parent.run_id)
    whole = run(colours, *qat, *options, "--save-dir", "whole")
    stopped = run_until(colours, "training", 5, *qat, *options, "--save-dir", "parts")
    parts = run(colours, "--resume", stopped.run_id, *options, "--save-dir", "elsewhere")
    payloads = [read_checkpoint(one.result.checkpoint) for one in (whole, parts)]
    assert_same_state(*payloads)
    assert payloads[0]["config"]["recipe"] == "qat"
    assert client.get_run(str(whole.run_id)).data.tags["init_from.run"] == parent.run_id
    assert payloads[0]["model"]["quantization"] == "int8"
    before = read_checkpoint(parent.result.checkpoint)["state_dict"]
    after = payloads[0]["state_dict"]
    trained = [key for key in before if key.endswith("weight") and not torch.equal(before[key], after[key])]
    assert len(trained) == sum(key.endswith("weight") for key in before)
    fixed = [key for key in before if "running" in key]
    assert all(torch.equal(before[key], after[key]) for key in fixed)

    target = tmp_path / "net.onnx"
    result = shufflenet("export", whole.run_id, "--format", "onnx", "--int8", "--output", target, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["equal_labels"] == 1.0
    exported, _ = open_exported(target)
    assert (exported.is_int8, exported.settings["qat"]) == (True, True)
    held = {
        float(value)
        for tensor in onnx.load(target).graph.initializer
        for value in np.ravel(numpy_helper.to_array(tensor))
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.dims
    }
    scales = {float(value[0]) for key, value in after.items() if key.rpartition(".")[2] in SCALES}
    assert scales <= held
    evaluated = []
    for ref in (whole.run_id, target):
        answer = shufflenet("eval", ref, "--json")
        assert answer.exit_code == 0, answer.output
        evaluated.append(json.loads(answer.stdout))
    assert evaluated[0]["top1"] == evaluated[1]["top1"] > 0.9
    rows = [shufflenet("predict", ref, colours / "val" / "red", "--json").stdout for ref in (whole.run_id, target)]
    of_checkpoint, of_file = (json.loads(row) for row in rows)
    assert [row["label"] for row in of_checkpoint] == [row["label"] for row in of_file]


@pytest.mark.long
def test_the_average_and_micro_batches(colours: Path, parent: Any) -> None:
    """With a moving average, the scales stay what they are, to the last bit; with micro-batches it resumes, too."""
    options = ("--qat", "p", *OPTIONS, "--total-iters", 8, "--ema-decay", 0.9, "--micro-batch-size", 4)
    whole = run(colours, *options, "--save-dir", "whole")
    run_until(colours, "training", 3, *options, "--save-dir", "parts")
    payloads = [
        read_checkpoint(one.result.checkpoint) for one in (whole, run(colours, *options[2:], "--save-dir", "parts"))
    ]
    assert_same_state(*payloads)
    own, average = payloads[0]["state_dict"], payloads[0]["ema_state_dict"]
    names = [key for key in own if key.rpartition(".")[2] in SCALES]
    assert names
    assert all(torch.equal(own[key], average[key]) for key in names)
    assert any(not torch.equal(own[key], average[key]) for key in own)


@pytest.mark.long
def test_all_that_takes_a_checkpoint_takes_this_one(
    colours: Path, parent: Any, client: MlflowClient, tmp_path: Path, shufflenet: Invoke
) -> None:
    """A file for PyTorch has its bits; promoting serves it; freezing, a teacher and a second round work with it."""
    tuned = run(
        colours,
        "--qat",
        parent.run_id,
        *OPTIONS,
        "--total-iters",
        4,
        "--freeze",
        2,
        "--teacher",
        "p",
        "--save-dir",
        "q",
    )
    result = shufflenet("export", "q", "--output", tmp_path / "net.pt2", "--json")
    assert json.loads(result.stdout)["largest_difference"] == 0
    result = shufflenet("checkpoints", "promote", tuned.run_id, "--name", "pets", "--alias", "edge", "--json")
    assert result.exit_code == 0, result.output
    again = run(colours, "--qat", "models:/pets@edge", *OPTIONS, "--total-iters", 2, "--save-dir", "again")
    assert read_checkpoint(again.result.checkpoint)["model"]["quantization"] == "int8"


def test_what_does_not_go_together(colours: Path, parent: Any, images: Path, shufflenet: Invoke) -> None:
    tuned = run(colours, "--qat", parent.run_id, *OPTIONS, "--total-iters", 2, "--save-dir", "q")
    with pytest.raises(ConfigError, match="was trained with --qat; --qat q trains it further"):
        run(colours, "--init-from", "q")
    (colours / "train" / "red").rename(colours / "train" / "rouge")
    (colours / "val" / "red").rename(colours / "val" / "rouge")
    with pytest.raises(ConfigError, match="--qat: .* has other classes than .*; train it with --init-from first"):
        run(colours, "--qat", parent.run_id)
    result = shufflenet("export", "q", "--format", "onnx")
    assert (result.exit_code, "--int8 is missing" in result.output) == (2, True), result.output
    payload = dict(read_checkpoint(tuned.result.checkpoint))
    payload["model"] = {**payload["model"], "quantization": "int2"}
    with pytest.raises(CheckpointError, match="rounds as 'int2', which is not known here"):
        model_from_payload(payload, "it")


def test_a_float_network_is_what_it_was(parent: Any) -> None:
    payload = read_checkpoint(parent.result.checkpoint)
    assert "quantization" not in payload["model"]
    assert not list(layers_of(model_from_payload(payload, "it").module))
    assert files.INT8_FORMATS == ("onnx", "openvino")
