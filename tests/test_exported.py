"""Exported files in the place of checkpoints: evaluated, compared and promoted in their own runtime."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.onnx
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient, pyfunc
from onnx import numpy_helper

from shufflenet_mlflow.data import calibration
from shufflenet_mlflow.data.decode import CentreCrop
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.export import export_file, files, program
from shufflenet_mlflow.export.exported import open_exported
from shufflenet_mlflow.export.program import PixelsToLogits, example_pixels
from shufflenet_mlflow.export.weights import SETTINGS_KEY, sealed, sha256_of_onnx
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from tests.support.command_line import Invoke
from tests.support.effort import only_in_full_run
from tests.support.images import write_images
from tests.support.training import run
from tests.test_export import network, png, short_networks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `network()` in each format; tests share the files, so they only read."""
    folder = tmp_path_factory.mktemp("written")
    with short_networks():
        for form, suffix in files.SUFFIXES.items():
            if form == "openvino":
                continue
            export_file(network(), folder / f"net{suffix}", form)
    return folder


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_is_a_network_with_the_same_preprocessing(suffix: str, written: Path) -> None:
    exported, loaded = open_exported(written / f"net{suffix}")
    with short_networks():
        ours = network()
        pixels = example_pixels(ours, 3)
        assert loaded.labels == ours.labels
        assert eval_transform(loaded.preprocess) == eval_transform(ours.preprocess)
        with torch.inference_mode():
            expected = PixelsToLogits(ours)(pixels)
            found = fuse_bn(loaded.module)(pixels.float())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert exported.bytes == (written / f"net{suffix}").stat().st_size
    assert exported.origin == {}


def changed(path: Path, change: Callable[[Any], None], *, restamped: bool) -> Path:
    """Write a copy of an ONNX file with `change` applied; restamped, it does not show that it was changed."""
    model = onnx.load(path)
    change(model)
    if restamped:
        settings = json.loads(model.metadata_props[0].value)
        model.metadata_props[0].value = sealed(settings, sha256_of_onnx(model))
    copy = path.with_name("changed.onnx")
    copy.write_bytes(model.SerializeToString())
    return copy


def one_weight(model: Any) -> None:
    """Change one weight: that from the first feature to the first class."""
    [head] = [node for node in model.graph.node if node.op_type == "Gemm"]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e4
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_a_changed_weight_is_refused(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes((written / "net.onnx").read_bytes())
    with pytest.raises(ExportError, match="holds other weights than it was written with"):
        open_exported(changed(path, one_weight, restamped=False))
    open_exported(changed(path, one_weight, restamped=True))


def without_settings(model: Any) -> None:
    del model.metadata_props[:]


def with_other_settings(model: Any) -> None:
    model.metadata_props[0].value = json.dumps({"labels": 3})


def with_labels_of_others(model: Any) -> None:
    settings = json.loads(model.metadata_props[0].value)
    classes = {label: index for index, label in enumerate(reversed(settings["labels"]))}
    del settings[SETTINGS_KEY]  # as versions before it wrote them
    model.metadata_props[0].value = json.dumps({**settings, "origin": {"class_to_idx": classes}})


def with_another_class(model: Any) -> None:
    settings = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps({**settings, "labels": ["cat", *settings["labels"][1:]]})


def test_files_that_are_not_ours(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes((written / "net.onnx").read_bytes())
    for change, expected in (
        (without_settings, "holds no classifier.json"),
        (with_other_settings, "not understood"),
        (with_labels_of_others, "its labels are not its classes"),
        (with_another_class, "its classifier.json, with its classes and preprocessing, was changed since"),
    ):
        with pytest.raises(ExportError, match=expected):
            open_exported(changed(path, change, restamped=False))
    for suffix in (".onnx", ".pt2"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"nothing\nof that kind" * 100)
        with pytest.raises(ExportError, match=r"cannot be read as [^\n]*$"):
            open_exported(broken)
    (tmp_path / "lonely.xml").write_text("<net/>")
    with pytest.raises(ExportError, match=r"needs its weights, 'lonely.bin', beside it"):
        open_exported(tmp_path / "lonely.xml")


def test_weights_that_are_not_whole(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export_file(network(), tmp_path / "net.xml", "openvino")
    weights = tmp_path / "net.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"^'net.bin', the weights of '[^\n]*net.xml', is not whole \([^\n]*$"):
        open_exported(tmp_path / "net.xml")


def test_suffixes_in_capitals(written: Path, tmp_path: Path, images: Path, shufflenet: Invoke) -> None:
    for suffix in (".onnx", ".pt2"):
        (tmp_path / f"NET{suffix.upper()}").write_bytes((written / f"net{suffix}").read_bytes())
        rows = said(shufflenet, "predict", tmp_path / f"NET{suffix.upper()}", images / "val" / "red")
        assert rows == said(shufflenet, "predict", written / f"net{suffix}", images / "val" / "red")


# ---------------------------------------------------------------- in the run


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Write images whose colour is their class, enough for a test to tell chance."""
    for part, count in (("train", 16), ("val", 24)):
        write_images(tmp_path / "colours" / part, per_class=count, seed=len(part))
    return tmp_path / "colours"


@pytest.fixture
def trained(client: MlflowClient, colours: Path) -> Iterator[Any]:
    with short_networks():
        yield run(colours, "--lr", 0.02, "--total-iters", 60, "--batch-size", 16, "--augment", "none")


def said(shufflenet: Invoke, *words: object) -> Any:
    result = shufflenet(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.long
def test_the_way_of_a_file(
    client: MlflowClient, colours: Path, tmp_path: Path, trained: Any, shufflenet: Invoke
) -> None:
    """Export, evaluate, compare, promote; and what is broken on the way is caught."""
    val, run_id, target = colours / "val", trained.run_id, tmp_path / "net.int8.onnx"
    written = said(shufflenet, "export", run_id, "--format", "onnx", "--int8", "--output", target)
    result = shufflenet("compare", target)
    assert (result.exit_code, "has no evaluation of 'net.int8.onnx'" in result.output) == (1, True), result.output
    of_file = said(shufflenet, "eval", target)  # on the run's validation images
    assert (of_file["run_id"], of_file["logged_to"], of_file["n"]) == (run_id, run_id, 72)
    assert said(shufflenet, "eval", target, "--val-dir", val, "--log-to", "none")["top1"] == of_file["top1"]
    assert said(shufflenet, "eval", target, "--log-to", "none")["top1"] == of_file["top1"]
    result = shufflenet("compare", target)
    assert (result.exit_code, "has no evaluation of" in result.output) == (1, True), result.output
    of_checkpoint = said(shufflenet, "eval", run_id, "--val-dir", val)
    assert of_checkpoint["top1"] > 0.9
    assert of_file["top1"] > 0.9
    stored = client.get_run(run_id).data
    assert stored.metrics["deploy/onnx-int8/top1"] == of_file["top1"]
    tag = json.loads(stored.tags["deploy.onnx-int8"])
    assert (tag["sha256"], tag["checkpoint"]) == (written["sha256"], Path(written["checkpoint"]).name)
    assert tag["checkpoint_sha256"] == json.loads(stored.tags["checkpoint.best"])["sha256"]
    [comparison] = said(shufflenet, "compare", target)
    [test] = comparison["paired_tests"]
    assert (test["images"], test["second_top1"], test["p_value"] > 0.05) == (72, of_file["top1"], True)

    promoted = said(shufflenet, "checkpoints", "promote", target, "--name", "pets", "--alias", "edge")
    assert said(shufflenet, "checkpoints", "promote", target, "--name", "pets")["version"] == promoted["version"]
    tags = client.get_model_version_by_alias("pets", "edge").tags
    assert tags["export.sha256"] == written["sha256"]
    assert (tags["export.bytes"], tags["export.top1"]) == (str(target.stat().st_size), str(of_file["top1"]))
    pictures = [(val / "red" / "000.png").read_bytes(), png()]
    answers = pyfunc.load_model("models:/pets@edge").predict(pd.DataFrame({"image": pictures}))
    (tmp_path / "noise.png").write_bytes(png())
    asked = said(shufflenet, "predict", target, val / "red" / "000.png", tmp_path / "noise.png")
    assert answers["label"].tolist() == [row["label"] for row in asked]
    np.testing.assert_allclose(answers["probability"], [row["probability"] for row in asked], rtol=1e-5)
    assert mlflow.onnx.load_model("models:/pets@edge").graph.input[0].name == "images"

    said(shufflenet, "export", run_id, "--format", "onnx", "--output", tmp_path / "net.onnx")
    broken = changed(tmp_path / "net.onnx", one_weight, restamped=True)
    assert said(shufflenet, "eval", broken, "--val-dir", val)["top1"] < 0.7
    shown = shufflenet("compare", broken)
    assert re.search(r"the checkpoint is better by 0\.\d+ in accuracy \(p = ", shown.output), shown.output


@pytest.mark.long
def test_the_wrong_colour_order(colours: Path, tmp_path: Path, trained: Any, shufflenet: Invoke) -> None:
    """An export that takes BGR for RGB, in its calibration and in what it says of its input."""
    val, target = colours / "val", tmp_path / "swapped.onnx"

    def swapped(preprocess: Preprocess) -> CentreCrop:
        transform = eval_transform(preprocess)
        return replace(transform, channels=transform.channels[::-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "eval_transform", swapped)
        patch.setattr(program, "eval_transform", swapped)
        said(shufflenet, "export", trained.run_id, "--format", "onnx", "--int8", "--output", target)
    of_checkpoint = said(shufflenet, "eval", trained.run_id, "--val-dir", val)
    of_file = said(shufflenet, "eval", target, "--val-dir", val)
    assert of_file["top1"] < of_checkpoint["top1"] - 0.2, (of_file["top1"], of_checkpoint["top1"])
    [comparison] = said(shufflenet, "compare", target)
    [test] = comparison["paired_tests"]
    assert test["p_value"] < 0.01
    assert len(test["only_first_right"]) > len(test["only_second_right"])


def test_what_a_file_does_not_take(written: Path, images: Path, shufflenet: Invoke) -> None:
    file, val = written / "net.onnx", images / "val"
    cases = [
        (("eval", file, "--val-dir", val, "--input-size", 64), 2, "--input-size (=64) is for checkpoints"),
        (("predict", file, images / "val" / "red", "--device", "cuda"), 2, "--device (=cuda)"),
        (("eval", file), 2, "--val-dir is missing: the file"),
        (("export", file), 1, "is an export already"),
        (("compare", file, "0123456789ab"), 2, "0123456789ab is not an exported file"),
        (("compare", file, "--out", "x"), 2, "--out is for runs"),
        (("compare", file), 1, "does not say which run it is from"),
        (("checkpoints", "promote", file, "--name", "pets"), 1, "does not say which run it is from"),
    ]
    assert shufflenet("predict", file, images / "val" / "red", "--input-size", 32).exit_code == 0
    for words, status, expected in cases:
        result = shufflenet(*words)
        assert (result.exit_code, expected in result.output) == (status, True), (words, result.output)
        assert "Traceback" not in result.output


@only_in_full_run
@pytest.mark.long
def test_a_pt2_is_not_promoted(trained: Any, tmp_path: Path, shufflenet: Invoke) -> None:
    said(shufflenet, "export", trained.run_id, "--output", tmp_path / "net.pt2")
    result = shufflenet("checkpoints", "promote", tmp_path / "net.pt2", "--name", "pets")
    assert (result.exit_code, "promote an .onnx" in result.output) == (1, True), result.output
