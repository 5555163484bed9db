"""`shufflenet bench`, and the defaults that training derives from the machine."""

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.data import loader
from shufflenet_mlflow.workflows.bench import EXPERIMENT
from tests.support.command_line import Invoke

Usage = namedtuple("Usage", "total used free")


def test_bench(images: Path, client: MlflowClient, workplace: Path, shufflenet: Invoke) -> None:
    uri = f"sqlite:///{workplace}/mlflow.db"
    folder = ["--train-dir", str(images / "train"), "--input-size", "32", "--batch-size", "8", "--workers", "1"]
    result = shufflenet("bench", *folder, "--iterations", "2", "--tracking-uri", uri, "--json")
    found = json.loads(result.stdout)
    assert (found["model"], found["input_size"], found["batch_size"]) == ("shufflenet_v2_x0_5", 32, 8)
    assert [part["name"] for part in found["parts"]] == ["data", "step", "checkpoint", "tracking"]
    assert all(part["milliseconds"] > 0 for part in found["parts"])
    assert found["bottleneck"] == max(found["parts"], key=lambda part: part["milliseconds"])["name"]
    assert found["milliseconds"] > 0
    assert found["images_per_second"] == pytest.approx(1000 * 8 / found["milliseconds"])
    # The run in which tracking was measured is gone, and nothing lies in the working directory.
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert not client.search_runs([experiment.experiment_id])
    assert not Path("models").exists()


def test_bench_says_what_it_measured(images: Path, workplace: Path, shufflenet: Invoke) -> None:
    folder = ["--train-dir", str(images / "train"), "--input-size", "32", "--batch-size", "8"]
    result = shufflenet("bench", *folder, "--iterations", "1", "--tracking-uri", f"sqlite:///{workplace}/mlflow.db")
    lines = result.stdout.splitlines()
    assert lines[0] == "shufflenet_v2_x0_5, 32 px, batches of 8"
    assert any(line.startswith("iteration") and line.endswith("images/s in total") for line in lines)
    assert "Bottleneck: " in lines[-1]


@pytest.mark.long
def test_bench_uses_a_temporary_store(images: Path, client: MlflowClient, shufflenet: Invoke) -> None:
    folder = ["--train-dir", str(images / "train"), "--input-size", "32", "--batch-size", "8"]
    result = shufflenet("bench", *folder, "--iterations", "1")
    assert result.exit_code == 0, result.output
    assert client.get_experiment_by_name(EXPERIMENT) is None


def test_a_mistake_is_named(shufflenet: Invoke) -> None:
    result = shufflenet("bench", "--train-dir", "nowhere")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: --train-dir {str(Path.cwd() / 'nowhere')!r} does not exist; it needs one folder per class, such as "
        "cat/0001.jpg\n",
    )


@pytest.mark.parametrize(
    ("images", "cores", "local", "free", "expected"),
    [
        (100, 8, "1", 1 << 34, 0),  # too few to start processes for
        (10_000, 8, "1", 1 << 34, 8),
        (10_000, 64, "1", 1 << 40, 16),
        (10_000, 8, "4", 1 << 34, 2),  # four processes share the machine
        (10_000, 2, "4", 1 << 34, 1),
        (10_000, 8, "2", 128 << 20, 1),  # the memory is shared too
        (10_000, 8, "two", 1 << 34, 8),
        (10_000, 8, "1", 64 << 20, 1),  # a container with Docker's default of 64 MB
        (10_000, 8, "1", 10 << 20, 0),
    ],
)
def test_workers(
    images: int, cores: int, local: str, free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "usable_cores", lambda: cores)
    monkeypatch.setattr(loader, "SHARED_MEMORY", Path(os.sep))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(0, 0, free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert loader.default_workers(images, batch_size=64, input_size=224) == expected
