"""Fixtures that every test file can ask for: images, a tracking store, a server, the command line."""

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.store.db import utils as database
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyRegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyTrackingStore
from sqlalchemy import event
from sqlalchemy.engine import Engine

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.models.search_space import CHANNEL_SUPERNET
from shufflenet_mlflow.tracking import lease
from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images
from tests.support.metrics import history
from tests.support.mlflow_server import Server
from tests.support.proxy import Proxy
from tests.support.searches import train_supernet
from tests.support.training import run


@pytest.fixture(autouse=True, scope="session")
def outside_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the checkout: MLflow writes artifacts below the folder in which a store is created."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("outside"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `train` (36 images) and `val` (15) of three classes; tests share them, so they only read."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train")
    write_images(root / "val", per_class=5, seed=1)
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one cache folder across the session, so that the digits are written once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="session")
def quick_stores() -> Iterator[None]:
    """Save every new store 67 migrations to read, every write a sync, and every lease a second in which to lose it."""

    def skip_syncs(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            with contextlib.suppress(sqlite3.Error):  # a file that is no store is the test's affair
                connection.execute("PRAGMA synchronous = OFF")  # no test loses power

    event.listen(Engine, "connect", skip_syncs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_get_latest_schema_revision", functools.cache(database._get_latest_schema_revision))
        patch.setattr(lease, "SETTLE_SECONDS", 0.0)  # no test is two processes that take one run at once
        yield
    event.remove(Engine, "connect", skip_syncs)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a store once: its schema takes 2 s to create and no time to copy."""
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
    """Give every test its own working directory with an empty store, no MLflow settings, and an untouched log."""
    library = logging.getLogger("shufflenet_mlflow")
    library.handlers, library.propagate = [], True  # a command of another test has set them up for itself
    library.setLevel(logging.NOTSET)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path_factory.mktemp("work")
    shutil.copy(empty_database, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", str(cache_dir))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    yield folder
    # MLflow keeps the connections of every store for as long as the process lives.
    for store in (SqlAlchemyTrackingStore, SqlAlchemyRegistryStore):
        if engine := store._engine_map.pop(f"sqlite:///{folder}/mlflow.db", None):
            engine.dispose()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: small networks gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture
def client(workplace: Path) -> MlflowClient:
    """Return a client of this test's store."""
    return MlflowClient(f"sqlite:///{workplace}/mlflow.db")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start an `mlflow server` for the tests of one module; that takes 10 s."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.send(signal.SIGCONT)
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """Put a proxy in front of the server, for tests to make it slow or fail."""
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def shufflenet() -> Invoke:
    """Run the command in this process; the result holds the exception that ended it, if any."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def small_train(images: Path, shufflenet: Invoke) -> Callable[..., dict[str, Any]]:
    """Run `shufflenet train` on the small images and return what `--json` prints."""

    def train(*arguments: object) -> dict[str, Any]:
        result = shufflenet("train", *small_options(images), "--json", *arguments)
        assert result.exit_code == 0, result.output
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    return train


@pytest.fixture(scope="session")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, cache_dir: Path) -> Any:
    """Return the last checkpoint's payload and the metric history of an undisturbed run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    uri = f"sqlite:///{folder}/mlflow.db"
    summary = run(images, "--save-dir", folder / "models", "--tracking-uri", uri)
    return read_checkpoint(folder / "models" / "bnps-checkpoint-000012.pth.tar"), history(
        MlflowClient(uri), summary.run_id
    )


@pytest.fixture(scope="module")
def supernet(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Return the last checkpoint of a supernet."""
    folder = tmp_path_factory.mktemp("supernet")
    shutil.copy(empty_database, folder / "mlflow.db")
    return train_supernet(images, folder)


@pytest.fixture(scope="module")
def channel_supernet(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Return the last checkpoint of the supernet of a channel search."""
    folder = tmp_path_factory.mktemp("channel-supernet")
    shutil.copy(empty_database, folder / "mlflow.db")
    return train_supernet(images, folder, CHANNEL_SUPERNET)
