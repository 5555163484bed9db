"""Folders whose names mean something else in a URI: every command works in them, and no second folder appears."""

import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyRegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as SqlAlchemyTrackingStore
from sqlalchemy import create_engine, text

from shufflenet_mlflow.tracking.paths import (
    file_of,
    file_uri,
    for_mlflow,
    query_of,
    read_only_uri,
    store_file,
    store_uri,
)
from shufflenet_mlflow.tracking.uris import check_address, mlflow_command, stored_uri
from tests.support.command_line import Invoke, small_options

NAMES = ["My Project", "a#b", "käse", "100%", "a%41b", "what?", "a@b;c&d=e", 'it\'s "x":y']
ALL_AT_ONCE = """My "käse"; it's #1, 100%: what?&b=c@d"""


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder of that name, in which there is no store yet; MLflow knows of none either."""
    folder = tmp_path / request.param
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    yield folder
    for store in (SqlAlchemyTrackingStore, SqlAlchemyRegistryStore):
        for uri in [uri for uri in store._engine_map if str(tmp_path) in uri]:
            store._engine_map.pop(uri).dispose()


class Commands:
    """Calls of the command line, each of which leaves a single folder behind."""

    def __init__(self, shufflenet: Invoke, parent: Path) -> None:
        self.shufflenet, self.parent = shufflenet, parent
        self.before = {path.name for path in parent.iterdir()}

    def __call__(self, *words: object) -> Any:
        result = self.shufflenet(*words, "--json")
        assert result.exit_code == 0, (words, result.output)
        assert {path.name for path in self.parent.iterdir()} == self.before, words
        return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("folder", "given"),
    [
        *((name, "nothing") for name in NAMES),
        # each in a path of its own: pytest uses a temporary folder's name again, and MLflow keeps files open by name
        *((f"{ALL_AT_ONCE} a%41b {given}", given) for given in ("relative", "absolute", "percent-encoded")),
    ],
    indirect=["folder"],
)
def test_what_is_trained_there_is_found_there(
    folder: Path, given: str, images: Path, shufflenet: Invoke, empty_database: Path
) -> None:
    database = folder / "mlflow.db"
    shutil.copy(empty_database, database)
    addresses = {
        "relative": "sqlite:///mlflow.db",
        "absolute": f"sqlite:///{database}",
        "percent-encoded": f"sqlite:///{quote(str(database))}",
    }
    store = ("--tracking-uri", addresses[given]) if given in addresses else ()
    commands = Commands(shufflenet, folder.parent)
    trained = commands("train", *small_options(images), "--total-iters", 1, *store)
    assert trained["pending"] == 0
    rows = commands("checkpoints", "ls", trained["run_id"], *store)
    there = {path.name for path in folder.glob(f"mlruns/*/{trained['run_id']}/artifacts/checkpoints/*.tar")}
    assert {row["file"] for row in rows} == there
    assert [run["run_id"] for run in commands("runs", *store)] == [trained["run_id"]]
    commands("sync", trained["save_dir"])
    assert commands("eval", trained["run_id"], "--log-to", "none", "--cache-dir", "cache", *store)["n"] == 15


@pytest.mark.long
@pytest.mark.parametrize("folder", [ALL_AT_ONCE], indirect=True)
def test_every_command_works_in_it(
    folder: Path, images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the store's creation on, also with temporary files there."""
    (folder / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
    commands = Commands(shufflenet, folder.parent)
    options = [word for word in small_options(images) if word != "--no-log-models"]
    trained = commands("train", *options, "--total-iters", 2, "--save-interval", 1)
    run_id = trained["run_id"]
    assert trained["pending"] == trained["refused"] == 0
    assert (folder / "mlflow.db").is_file()
    first, *_ = artifacts = sorted(
        folder.glob("mlruns/*/*/artifacts/checkpoints/*.pth.tar"), key=lambda path: path.name[-14:]
    )
    assert len(artifacts) == 3
    assert commands("runs", "show", run_id)["models"]
    assert all(row["remote"] for row in commands("checkpoints", "ls", trained["save_dir"]))
    assert all(verdict["ok"] for verdict in commands("checkpoints", "verify", run_id))
    pulled = commands("checkpoints", "pull", f"runs:/{run_id}@1", "--output", "pulled", "--cache-dir", "cache")
    assert Path(pulled["path"]).read_bytes() == first.read_bytes()
    assert commands("eval", run_id)["logged_to"] == run_id
    other = commands("eval", run_id, "--log-to", "new")["logged_to"]
    commands("compare", run_id, other, "--out", "compared")
    commands("checkpoints", "promote", run_id, "--name", "net", "--alias", "best")
    picture = next((images / "val").rglob("*.png"))
    [answer] = commands("predict", "models:/net@best", picture, "--cache-dir", "cache2")
    commands("export", run_id, "--format", "mlflow", "--output", "served")
    forked = commands("train", "--resume", f"runs:/{run_id}@1", "--new-run", "--save-dir", "fork", "--no-log-models")
    assert forked["run_id"] != run_id
    commands("checkpoints", "prune", forked["run_id"], "--keep-last", 1)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    _serve_with_mlflow_itself(folder, picture, answer["label"])


def _serve_with_mlflow_itself(folder: Path, picture: Path, label: str) -> None:
    """Load the promoted and the exported model as the suggested `mlflow models serve` does, in another process.

    MLflow cannot do that in a folder such as `a%41b`, whatever the model is called.
    """
    before = {path.name for path in folder.parent.iterdir()}
    code = (
        "import base64, sys, mlflow.pyfunc, pandas as pd\n"
        "image = base64.b64encode(open(sys.argv[1], 'rb').read()).decode()\n"
        "for uri in sys.argv[2:]:\n"
        "    print(mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({'image': [image]}))['label'][0])\n"
    )
    command = mlflow_command(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {shlex.quote(str(picture))}", "sqlite:///mlflow.db"
    )
    command += " models:/net@best served"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.split() == [label, label], result.stderr
    assert {path.name for path in folder.parent.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_folder_that_is_not_unicode(
    tmp_path: Path,
    images: Path,
    shufflenet: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    workplace: Path,
    is_elsewhere: bool,
) -> None:
    """MLflow cannot note such a path, neither the store's nor the one of a new experiment's artifacts."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    if not is_elsewhere:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result = shufflenet("train", *small_options(images), "--total-iters", 1)
    assert (result.exit_code, "Traceback" in result.output) == (1, False), result.output
    assert "caf\\udce9" in result.stderr and "is not valid UTF-8" in result.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", [*NAMES, ALL_AT_ONCE, "what?a=b"])
def test_a_store_at_any_path(name: str, tmp_path: Path) -> None:
    """SQLAlchemy opens the same file that we name, and shows none beside it."""
    file = tmp_path / name / f"{name}.db"
    file.parent.mkdir()
    uri = store_uri(file, "?timeout=5")
    assert (store_file(uri), query_of(uri), stored_uri(uri)) == (file, "?timeout=5", uri)
    check_address(uri)
    engine = create_engine(for_mlflow(uri))
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE t (x)"))
    engine.dispose()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    with closing(sqlite3.connect(read_only_uri(file), uri=True)) as store:
        assert store.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]
    assert file_of(file_uri(file)) == file


def test_which_of_two_spellings_is_meant(tmp_path: Path) -> None:
    """The path as written, if its file exists, or its folder; else the decoded one, if that does."""
    uri = f"sqlite:///{tmp_path}/a%20b/x.db"
    written, decoded = tmp_path / "a%20b" / "x.db", tmp_path / "a b" / "x.db"
    assert store_file(uri) == written
    for file, makes in ((decoded, "folder"), (written, "folder"), (decoded, "file"), (written, "file")):
        file.parent.mkdir(exist_ok=True)
        if makes == "file":
            file.touch()
        assert store_file(uri) == file


@pytest.mark.parametrize("uri", ["http://host/a", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true"])
def test_other_stores_are_left_as_they_are(uri: str) -> None:
    assert store_file(uri) is None
    assert for_mlflow(uri) == stored_uri(uri) == uri
    check_address(uri)
