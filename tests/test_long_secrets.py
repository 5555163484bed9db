"""Passwords and keys of servers and stores: none is found in anything that is written."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backing_stores import BUCKET, PASSWORD, S3, S3_SECRET, Postgres, why_no_backing_stores
from tests.support.command_line import small_options
from tests.support.effort import cases, only_in_full_run
from tests.support.mlflow_server import Server
from tests.support.processes import start

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

USER, SECRET = "admin", "tracking-secret-4713"
SERVER_KEY = "flask-secret-4714"

needs_flask_wtf = pytest.mark.skipif(
    importlib.util.find_spec("flask_wtf") is None, reason="flask-wtf missing: pip install '.[deployments]'"
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start `mlflow server` with its basic-auth app."""
    folder = tmp_path_factory.mktemp("guarded")
    server = Server(
        folder,
        options=("--app-name", "basic-auth"),
        env={"MLFLOW_AUTH_ADMIN_PASSWORD": SECRET, "MLFLOW_FLASK_SERVER_SECRET_KEY": SERVER_KEY},
    )
    yield server
    server.kill()


def files_below(*folders: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.name != "server.log"
    }


def assert_nowhere(secret: str, contents: dict[object, bytes]) -> None:
    assert len(contents) > 10
    found = [name for name, content in contents.items() if secret.encode() in content]
    assert not found


def the_whole_way(folder: Path, images: Path, *options: object, env: dict[str, str]) -> str:
    """Train, evaluate, promote and show a run; return everything that was printed."""
    printed = ""

    def say(*words: object, status: int = 0) -> str:
        nonlocal printed
        process = start(folder, *words, *options, env=env)
        out, err = process.communicate()
        assert process.returncode == status, err
        printed += out + err
        return out

    trained = json.loads(say("train", *small_options(images), "--no-log-models", "false", "--json"))
    run_id = trained["run_id"]
    assert trained["pending"] == 0
    say("eval", run_id, "--log-to", "source")
    say("checkpoints", "promote", run_id, "--name", "pets", "--alias", "champion")
    say("predict", "models:/pets@champion", images / "val" / "red" / "000.png")
    say("runs", "show", run_id)
    say("compare", run_id, run_id, status=2)
    say("sync", trained["save_dir"])
    return printed


@needs_flask_wtf
def test_user_and_password_in_the_environment(guarded: Server, images: Path, tmp_path: Path) -> None:
    env = {
        "MLFLOW_TRACKING_URI": guarded.uri,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": SECRET,
    }
    printed = the_whole_way(tmp_path / "work", images, env=env)
    assert SECRET not in printed
    assert_nowhere(SECRET, files_below(tmp_path, guarded.folder))


@only_in_full_run
@needs_flask_wtf
def test_user_and_password_in_the_uri(guarded: Server, images: Path, tmp_path: Path) -> None:
    uri = guarded.uri.replace("//", f"//{USER}:{SECRET}@")
    printed = the_whole_way(tmp_path / "work", images, "--tracking-uri", uri, env={"MLFLOW_TRACKING_URI": ""})
    assert SECRET not in printed
    assert_nowhere(SECRET, files_below(tmp_path, guarded.folder))


@needs_flask_wtf
@pytest.mark.parametrize("secret", cases(["wrong", None], ci=1))
def test_without_the_right_password(guarded: Server, images: Path, tmp_path: Path, secret: str | None) -> None:
    env = {"MLFLOW_TRACKING_URI": guarded.uri}
    if secret is not None:
        env |= {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": secret}
    for words in (("runs",), ("train", *small_options(images)), ("eval", "0" * 32)):
        process = start(tmp_path / "work", *words, env=env)
        out, err = process.communicate()
        assert process.returncode == 1, err
        assert out == ""
        [line] = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert "authenticated" in line or "password" in line, line
        assert "Traceback" not in err


@only_in_full_run
@pytest.mark.skipif(why_no_backing_stores() is not None, reason=str(why_no_backing_stores()))
def test_keys_of_the_stores(images: Path, tmp_path: Path) -> None:
    postgres = Postgres()
    try:
        s3 = S3(tmp_path)
        try:
            server = Server(
                tmp_path,
                store=postgres.uri,
                artifacts=("--default-artifact-root", f"s3://{BUCKET}/root", "--no-serve-artifacts"),
                env=s3.env,
            )
            try:
                env = {"MLFLOW_TRACKING_URI": server.uri, **s3.env}
                printed = the_whole_way(tmp_path / "work", images, env=env)
                everything = {"database": postgres.dump().encode(), **s3.contents(), **files_below(tmp_path / "work")}
            finally:
                server.kill()
        finally:
            s3.close()
    finally:
        postgres.close()
    for secret in (PASSWORD, S3_SECRET):
        assert secret not in printed
        assert_nowhere(secret, everything)


def test_a_dead_server_with_a_password_in_its_address(images: Path, tmp_path: Path) -> None:
    """Entries in the journal do not hold it either."""
    uri = f"http://{USER}:{SECRET}@127.0.0.1:9"
    process = start(tmp_path / "work", "train", *small_options(images), "--tracking-uri", uri, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["pending"] > 0
    assert SECRET not in out + err
    assert_nowhere(SECRET, files_below(tmp_path))
