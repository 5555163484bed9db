"""Networks of other packages from end to end: killed, resumed, exported, logged and served, all equal to ours."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder

from shufflenet_mlflow import create_model, read_checkpoint, save_checkpoint
from tests.support.command_line import Invoke, small_options
from tests.support.effort import cases
from tests.support.payloads import assert_equal_payloads
from tests.support.plugins import install

pytestmark = pytest.mark.long

VARYING = ("run_id", "created_at", "config")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path, monkeypatch)


def train(site: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "shufflenet_mlflow", "train", *map(str, arguments)]
    path = os.pathsep.join((str(site), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("name", cases(["tiny", "tv/mobilenet_v3_small"], ci=1))
def test_killed_and_resumed_as_if_nothing_had_happened(name: str, site: Path, images: Path, tmp_path: Path) -> None:
    options = (*small_options(images), "--model", name, "--input-size", 64, "--save-dir")
    assert train(site, *options, tmp_path / "whole").wait(300) == 0
    process = train(site, *options, tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoint-000005.pth.tar").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert train(site, *options, tmp_path / "killed").wait(300) == 0
    whole, resumed = (
        read_checkpoint(tmp_path / folder / "bnps-checkpoint-000012.pth.tar") for folder in ("whole", "killed")
    )
    assert_equal_payloads(
        {key: value for key, value in resumed.items() if key not in VARYING},
        {key: value for key, value in whole.items() if key not in VARYING},
    )


def test_trained_by_several_processes(site: Path, images: Path, tmp_path: Path) -> None:
    options = [*small_options(images), "--model", "tiny", "--save-dir", tmp_path / "saved", "--head-lr-factor", 2]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "shufflenet_mlflow", "train", *map(str, options)]
    path = os.pathsep.join((str(site), os.environ.get("PYTHONPATH", "")))
    subprocess.run(words, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True, timeout=280)
    assert read_checkpoint(tmp_path / "saved" / "bnps-checkpoint-000012.pth.tar")["model"]["name"] == "tiny"


@pytest.mark.parametrize("name", cases(["tiny", "tv/mobilenet_v3_small"], ci=1))
def test_exported_and_registered_it_answers_alike(
    name: str, site: Path, images: Path, small_train: Callable[..., dict[str, Any]], shufflenet: Invoke, tmp_path: Path
) -> None:
    """A registered model works without the package."""
    document = small_train("--model", name, "--input-size", 64, "--save-dir", "saved")
    onnx = shufflenet("export", document["checkpoint"], "--format", "onnx", "--output", tmp_path / "net.onnx", "--json")
    assert onnx.exit_code == 0, onnx.output  # compares the logits
    result = shufflenet(
        "checkpoints", "promote", f"{document['run_id']}@latest", "--name", "own", "--alias", "champion"
    )
    assert result.exit_code == 0, result.output
    pictures = sorted((images / "val").rglob("*.*"))
    predicted = json.loads(shufflenet("predict", document["checkpoint"], *pictures, "--json").stdout)
    code = (
        "import json, sys, mlflow, pandas as pd; from pathlib import Path; "
        "rows = mlflow.pyfunc.load_model('models:/own@champion').predict("
        "pd.DataFrame({'image': [Path(p).read_bytes() for p in sys.argv[1:]]})); "
        "print(json.dumps(rows.to_dict('records')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, pictures)], capture_output=True, text=True, timeout=200, check=True
    )
    served = json.loads(done.stdout.splitlines()[-1])
    assert [row["label"] for row in served] == [row["label"] for row in predicted]
    assert np.allclose([row["probability"] for row in served], [row["probability"] for row in predicted], atol=1e-5)


def test_a_loop_of_ones_own_and_predict_see_the_same(images: Path, shufflenet: Invoke) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    steps = [transforms.Resize(72), transforms.CenterCrop(64), transforms.ToTensor(), transforms.Normalize(mean, std)]
    data = ImageFolder(str(images / "val"), transforms.Compose(steps))
    seen = {"mean": mean, "std": std, "input_size": 64, "resize": 72}
    model: Any = create_model("torchvision/shufflenet_v2_x0_5", len(data.classes), preprocess=seen)
    model.fc.weight.data *= 30  # so that it has an opinion
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    inputs = torch.stack([image for image, _ in data])
    with torch.no_grad():
        model.train()(inputs)  # batch normalisation gets statistics
        expected = model.eval()(inputs).softmax(1)
    state = {"model": torch.compile(model)}
    path = save_checkpoint(state, 1, class_to_idx=data.class_to_idx)
    other = save_checkpoint(state, 2, class_to_idx=data.class_to_idx, preprocess={**seen, "channels": "BGR"})
    distances = [np.abs(predict(shufflenet, file, data) - expected.numpy()).max() for file in (path, other)]
    assert distances[0] < 0.02 < 0.1 < distances[1], distances


def predict(shufflenet: Invoke, checkpoint: Path, data: ImageFolder) -> "np.ndarray[Any, Any]":
    """Return the probability of each class for each image."""
    rows = json.loads(shufflenet("predict", checkpoint, *(file for file, _ in data.imgs), "--json").stdout)
    tops = [{top["label"]: top["probability"] for top in row["top"]} for row in rows]
    return np.array([[top[name] for name in data.classes] for top in tops])
