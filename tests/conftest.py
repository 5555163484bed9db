"""Real images, a real embedded MLflow store, a real command line: what the tests work on."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyRegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyTrackingStore
from PIL import Image

from shufflenet_mlflow.cli import main

if TYPE_CHECKING:
    from server import Proxy, Server

CLASSES = ("blue", "green", "red")


def write_images(folder: Path, classes: tuple[str, ...] = CLASSES, per_class: int = 12, seed: int = 0) -> Path:
    """An image folder whose classes differ in their brightest channel, with noise and odd sizes."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            height, width = rng.integers(33, 49, 2)
            pixels = rng.integers(0, 150, (height, width, 3), dtype=np.uint8)
            pixels[:, :, 2 - label % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture(autouse=True, scope="session")
def away_from_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow keeps artifacts below the folder in which a store is made, and must not do so in the checkout."""
    home = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(home)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `val` of three classes; 36 and 15 images. Not to be changed."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train")
    write_images(root / "val", per_class=5, seed=1)
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for the whole session, so that the digits are written once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its schema: making it takes 2 s, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def workplace(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    cache_dir: Path,
    empty_database: Path,
) -> Iterator[Path]:
    """Every test has a working directory of its own, with an empty store in it, and no MLflow settings."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path_factory.mktemp("work")
    shutil.copy(empty_database, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", str(cache_dir))
    yield folder
    # MLflow keeps the connections of every store for as long as the process lives.
    for store in (SqlAlchemyTrackingStore, SqlAlchemyRegistryStore):
        if engine := store._engine_map.pop(f"sqlite:///{folder}/mlflow.db", None):
            engine.dispose()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small networks gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture
def client(workplace: Path) -> MlflowClient:
    """The store of this test."""
    return MlflowClient(f"sqlite:///{workplace}/mlflow.db")


pytest.register_assert_rewrite("training", "crash", "server", "processes")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """A real `mlflow server` for a module's tests; starting one takes 10 s."""
    from server import Server

    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.send(signal.SIGCONT)
    server.kill()


@pytest.fixture
def proxy(server: "Server") -> Iterator["Proxy"]:
    """Stands before the server, and does as it is told."""
    from server import Proxy

    proxy = Proxy(server)
    yield proxy
    proxy.close()


Invoke = Callable[..., Result]


@pytest.fixture
def shufflenet() -> Invoke:
    """Run the command in this process; anything but a clean exit keeps its exception."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def small_train(images: Path, shufflenet: Invoke) -> Callable[..., dict[str, Any]]:
    """`shufflenet train` on the small images; returns what `--json` prints."""

    def train(*arguments: object) -> dict[str, Any]:
        result = shufflenet("train", *small_options(images), "--json", *arguments)
        assert result.exit_code == 0, result.output
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    return train


def small_options(images: Path) -> list[object]:
    """12 iterations on 36 images: three epochs of four batches of 8."""
    return [
        *("--train-dir", images / "train", "--val-dir", images / "val"),
        *("--input-size", 32, "--batch-size", 8, "--total-iters", 12, "--lr", 0.02),
        *("--display-interval", 2, "--val-interval", 4, "--save-interval", 5, "--workers", 0),
        "--no-log-models",  # each takes seconds; what makes them asks for them
    ]


def steps(client: MlflowClient, run_id: str, name: str) -> list[int]:
    """The steps of a metric's points, in the order they were logged."""
    return [point.step for point in client.get_metric_history(run_id, name)]


def values(client: MlflowClient, run_id: str, name: str) -> list[float]:
    """The values of a metric's points, by step."""
    points = client.get_metric_history(run_id, name)
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def assert_equal_payloads(first: Any, second: Any, where: str = "payload") -> None:
    """Compare nested containers exactly: no tolerance, tensors included."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal_payloads(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal_payloads(one, other, f"{where}[{index}]")
    else:
        assert first == second or (first != first and second != second), where


class Hostile:
    """Makes the folder `marker` where it is unpickled: what no checkpoint may be able to do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="session")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, cache_dir: Path) -> Any:
    """The final payload and the metric history of a run that nothing disturbed."""
    from training import history, run  # which imports from here

    from shufflenet_mlflow.checkpoints.verification import read_checkpoint

    folder = tmp_path_factory.mktemp("uninterrupted")
    uri = f"sqlite:///{folder}/mlflow.db"
    summary = run(images, "--save-dir", folder / "models", "--tracking-uri", uri)
    return read_checkpoint(folder / "models" / "bnps-checkpoint-000012.pth.tar"), history(
        MlflowClient(uri), summary.run_id
    )
