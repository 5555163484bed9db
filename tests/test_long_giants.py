"""Large and ExLarge in full: hundreds of millions of parameters, trained, saved, resumed, evaluated."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shufflenet_mlflow import create_model, load_checkpoint
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import MismatchError
from tests.support.command_line import Invoke
from tests.support.effort import cases, only_in_full_run
from tests.support.payloads import assert_equal_payloads

pytestmark = [pytest.mark.long, pytest.mark.alone]

GIANTS = ["shufflenet_v2_large", "shufflenet_v2_exlarge"]
"""Training ExLarge takes minutes; `test_families` trains a short one everywhere."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Use two threads: large networks gain from more than one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@only_in_full_run
@pytest.mark.parametrize("name", GIANTS)
@pytest.mark.timeout(1200)
def test_it_trains_and_resumes_bit_for_bit(
    name: str, small_train: Callable[..., dict[str, Any]], shufflenet: Invoke, tmp_path: Path
) -> None:
    # With fewer values per channel, batch normalisation makes the gradients overflow.
    options = ("--model", name, "--batch-size", 8, "--input-size", 32, "--lr", 0.0001, "--total-iters", 2)
    often = ("--save-interval", 1, "--val-interval", 2, "--display-interval", 1)
    whole = small_train(*options, *often, "--save-dir", tmp_path / "whole")
    expected = read_checkpoint(whole["checkpoint"])
    shutil.rmtree("mlruns")  # gigabytes of artifacts
    assert expected["iters"] == 2
    assert expected["loss"] > 2.5  # four losses of about log 3, weighed
    assert all(tensor.isfinite().all() for tensor in expected["state_dict"].values())
    for path in (tmp_path / "whole").glob("*checkpoint-000002*"):
        path.unlink()
    repeat = small_train(
        "--resume", tmp_path / "whole", "--new-run", "--save-dir", tmp_path / "again", *options, *often
    )
    resumed = read_checkpoint(repeat["checkpoint"])
    for key in ("state_dict", "optimizer_state_dict", "metrics"):
        assert_equal_payloads(resumed[key], expected[key], key)
    evaluated = json.loads(shufflenet("eval", repeat["checkpoint"], "--json").stdout)
    assert evaluated["top1"] == whole["val_top1"]
    shutil.rmtree("mlruns")


@pytest.mark.parametrize("name", GIANTS)
@pytest.mark.parametrize("legacy", cases([True, False], ci=1))
def test_original_files_load_with_and_without_the_auxiliary_heads(name: str, legacy: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = create_model(name), create_model(name)
    path = tmp_path / "model.pth.tar"
    everything = {f"module.{key}": value for key, value in source.state_dict().items()}
    without = {key: value for key, value in everything.items() if "predict_" not in key}
    torch.save({"state_dict": without}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(MismatchError, match="missing: predict_56"):
        load_checkpoint(target, path)
    report = load_checkpoint(target, path, strict=False)
    assert all(key.startswith("predict_") for key in report.missing)
    assert len(report.loaded) == len(without)
    torch.save({"state_dict": everything}, path, _use_new_zipfile_serialization=not legacy)
    assert load_checkpoint(target, path).is_complete
    for key, value in target.state_dict().items():
        assert torch.equal(value, everything[f"module.{key}"]), key
