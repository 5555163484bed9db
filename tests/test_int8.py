"""Exports to int8 and to OpenVINO: what they are calibrated on, and that they answer as the checkpoint does."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.export import Calibration, export_file, files
from shufflenet_mlflow.export.int8 import equal_labels
from shufflenet_mlflow.export.program import PixelsToLogits, example_pixels
from tests.support.command_line import Invoke
from tests.support.effort import only_in_full_run
from tests.support.training import run
from tests.test_export import network, short_networks


@pytest.fixture
def _short() -> Any:
    with short_networks():
        yield


def calibration(images: int = 40) -> Calibration:
    return Calibration(example_pixels(network(), images), "noise", "0123")


@pytest.mark.parametrize("form", ["onnx", pytest.param("openvino", marks=pytest.mark.long)])
@pytest.mark.usefixtures("_short")
def test_int8_answers_as_the_checkpoint(form: str, tmp_path: Path) -> None:
    pytest.importorskip(form if form == "openvino" else "onnxruntime")
    ours, target = network(), tmp_path / f"net{files.SUFFIXES[form]}"
    exported = export_file(ours, target, form, calibration=calibration())
    assert exported.difference < 0.1
    assert exported.equal_labels is not None
    assert exported.equal_labels >= 0.9
    load = files.FORMATS[form][1]
    pixels = example_pixels(ours, 7)
    with torch.inference_mode():
        expected = PixelsToLogits(ours)(pixels)
    found = load(target)(pixels)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert not torch.equal(found, expected)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted({target.suffix, *([".bin"] * (form != "onnx"))})


@only_in_full_run
@pytest.mark.long
@pytest.mark.usefixtures("_short")
def test_int8_weights_are_a_quarter(tmp_path: Path) -> None:
    export_file(network(), tmp_path / "float.onnx", "onnx")
    export_file(network(), tmp_path / "int8.onnx", "onnx", calibration=calibration())
    model = onnx.load(tmp_path / "int8.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    quantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert sum(node.input[1] in quantized for node in convolutions) == len(convolutions) - 1
    weights = [quantized[node.input[1]] for node in convolutions if node.input[1] in quantized]
    assert {kinds[node.input[0]] for node in weights} == {onnx.TensorProto.INT8}
    sizes = [(tmp_path / name).stat().st_size for name in ("int8.onnx", "float.onnx")]
    assert sizes[0] < 0.35 * sizes[1]


@pytest.mark.long
@pytest.mark.usefixtures("_short")
def test_openvino_is_equal(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    assert export_file(network(), tmp_path / "net.xml", "openvino").difference <= 1e-4


def test_quantised_programs_that_are_broken(tmp_path: Path) -> None:
    ours, pixels = network(), example_pixels(network(), 4)
    for broken in (torch.full((4, 3), float("nan")), torch.zeros(4, 2)):
        with pytest.raises(ExportError, match="not finite"):
            equal_labels(ours, lambda _, broken=broken: broken, pixels)  # type: ignore[misc]
    wrong = PixelsToLogits(ours)
    with torch.inference_mode(), pytest.raises(ExportError, match="label to 0 of 4 calibration images only"):
        equal_labels(ours, lambda pixels: wrong(pixels).roll(1, 1), pixels)


@pytest.mark.usefixtures("_short")
def test_what_cannot_be_quantised(tmp_path: Path) -> None:
    """Images of four channels: PyTorch raises an error of its own."""
    other = Calibration(torch.zeros(2, 4, 32, 32, dtype=torch.uint8), "noise", "0123")
    with pytest.raises(ExportError, match=r"shufflenet_v2_x0_5 cannot be quantised: [^\n]*; leave --int8 out$"):
        export_file(network(), tmp_path / "net.onnx", "onnx", calibration=other)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_calibrated_on_its_training_images(
    client: MlflowClient, images: Path, tmp_path: Path, shufflenet: Invoke
) -> None:
    summary = run(images)
    target = tmp_path / "net.onnx"
    words = ("export", summary.run_id, "--format", "onnx", "--int8", "--output", target)
    result = shufflenet(*words, "--calibration-images", 12, "--input-size", 64, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    inputs = client.get_run(summary.run_id).inputs.dataset_inputs
    [training] = [entry.dataset.digest for entry in inputs if entry.tags[0].value == "training"]
    assert document["calibration"] == {"images": 12, "source": document["calibration"]["source"], "digest": training}
    assert (document["bytes"], document["tolerance"], document["int8"]) == (target.stat().st_size, None, True)
    settings = json.loads(onnx.load(target).metadata_props[0].value)
    assert settings["calibration"] == document["calibration"]
    assert settings["prepare"]["crop"] == 64
    assert settings["origin"]["run_id"] == summary.run_id
    assert settings["origin"]["checkpoint"].endswith(".pth.tar")
    assert str(tmp_path) not in json.dumps(settings)


def test_calibration_images_that_are_not_there(images: Path, tmp_path: Path, shufflenet: Invoke) -> None:
    summary = run(images)
    payload = {**read_checkpoint(summary.result.checkpoint)}
    del payload["config"]
    torch.save(payload, "bare.pth.tar")
    result = shufflenet("export", "bare.pth.tar", "--format", "onnx", "--int8")
    assert (result.exit_code, "--calibration-dir is missing" in result.output) == (2, True), result.output
    broken = tmp_path / "broken" / "red"
    broken.mkdir(parents=True)
    (broken / "a.png").write_bytes(b"no picture")
    result = shufflenet("export", "bare.pth.tar", "--format", "onnx", "--int8", "--calibration-dir", broken.parent)
    assert result.exit_code == 1, result.output
    assert "can be read" in result.output or "readable image" in result.output
