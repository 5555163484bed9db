"""Completion in real shells, for a store with runs and registered models."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow import list_models
from shufflenet_mlflow.cli.completing import aliases, recent_runs
from shufflenet_mlflow.cli.recent import FILE_NAME, recent, remember
from tests.support.command_line import Invoke


@pytest.fixture
def run_id(client: MlflowClient, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A run that a command has listed, and a registered model whose alias one has set."""
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", str(tmp_path / "cache"))
    run_id: str = client.create_run(client.create_experiment("x"), run_name="a run").info.run_id
    assert shufflenet("runs", "--experiment", "x").exit_code == 0
    remember(None, aliases={"pets@champion": "version 1"})
    return run_id


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke) -> None:
    """Put the command `shufflenet` on PATH, and bash's script into the working directory."""
    Path("completion.bash").write_text(shufflenet("completion", "bash").stdout)
    program = tmp_path / "shufflenet"
    program.write_text(f"#!{sys.executable}\nfrom shufflenet_mlflow.cli import main\nmain(prog_name='shufflenet')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def complete(line: str) -> list[str]:
    """Return what bash would replace the last word of `line` with."""
    script = f"""
        source completion.bash
        compopt() {{ COMPREPLY+=("<$2>"); }}
        COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
        _shufflenet_completion shufflenet
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


@pytest.mark.usefixtures("on_path")
def test_bash(run_id: str) -> None:
    for line, offered in {
        "shufflenet ev": ["eval"],
        "shufflenet checkpoints pr": ["promote", "prune"],
        "shufflenet train --model shufflenet_v2_x": [
            name for name in list_models() if name.startswith("shufflenet_v2_x")
        ],
        "shufflenet train --mod": ["--model"],
        f"shufflenet eval {run_id[:4]}": [run_id],
        f"shufflenet compare {run_id} {run_id[:4]}": [run_id],
        "shufflenet train --resume au": ["auto"],
        # Bash puts these behind the last colon or @ that was typed.
        f"shufflenet eval runs:/{run_id[:4]}": [f"/{run_id}"],
        "shufflenet predict models:/pe": ["/pets@champion"],
        "shufflenet predict models:/pets@ch": ["champion"],
        "shufflenet eval x": ["<default>"],
        "shufflenet sync ": ["<dirnames>"],
        "shufflenet train --amp ": ["off", "bf16", "fp16"],
    }.items():
        assert sorted(complete(line)) == sorted(offered), line


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells(shell: str, run_id: str, shufflenet: Invoke) -> None:
    script = shufflenet("completion", shell)
    assert (script.exit_code, "_SHUFFLENET_COMPLETE" in script.stdout) == (0, True)
    words = {"COMP_WORDS": f"shufflenet eval {run_id[:4]}", "COMP_CWORD": run_id[:4] if shell == "fish" else "2"}
    environment = {**os.environ, **words, "_SHUFFLENET_COMPLETE": f"{shell}_complete"}
    ran = subprocess.run(["shufflenet"], capture_output=True, text=True, env=environment, check=False)
    assert run_id in ran.stdout
    assert "a run" in ran.stdout  # these shells show what a word stands for
    if path := shutil.which(shell):
        checked = subprocess.run([path, "-n"], input=script.stdout, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_completing_imports_nothing_heavy(run_id: str) -> None:
    code = (
        "import atexit, sys; import shufflenet_mlflow.cli as cli\n"
        "heavy = {'torch', 'mlflow', 'rich', 'numpy'}\n"
        "atexit.register(lambda: print('\\n' + str(sorted(heavy & sys.modules.keys()))))\n"
        "cli.main(prog_name='shufflenet')\n"
    )
    environment = {
        **os.environ,
        "COMP_WORDS": "shufflenet eval ",
        "COMP_CWORD": "2",
        "_SHUFFLENET_COMPLETE": "zsh_complete",
    }
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run_id in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"


def test_stores_that_do_not_answer_offer_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database")
    for uri in (
        f"sqlite:///{tmp_path}/none.db",
        f"sqlite:///{tmp_path}/text.db",
        "http://127.0.0.1:9",
        "postgresql://x/y",
    ):
        assert recent_runs(uri) == []
        assert aliases(uri) == []
    assert not (tmp_path / "none.db").exists()


def test_what_commands_have_met(
    small_train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", str(tmp_path))
    uri = os.environ["MLFLOW_TRACKING_URI"]
    first = small_train("--total-iters", 1, "--run-name", "first")["run_id"]
    assert recent_runs(uri) == [(first, "first")]
    remember(uri, runs={"f" * 32: "second", first: ""})
    assert recent_runs(uri) == [(first, "first"), ("f" * 32, "second")]  # the folder of the first is here
    assert (recent("runs", None), recent("runs", "sqlite:///other.db")) == (
        {"f" * 32: "second", first: "first"},
        {},
    )
    for number in range(100):
        remember(uri, runs={f"{number:032x}": ""}, aliases={f"a@{number}": ""})
        remember(f"sqlite:///{number}.db", runs={f"{number:032x}": ""})
    assert (len(recent("runs", uri)), len(json.loads((tmp_path / FILE_NAME).read_text()))) == (50, 20)
    remember("postgresql://user:s3cret@host/x", runs={first: ""})
    assert "s3cret" not in (tmp_path / FILE_NAME).read_text()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"sqlite:///x": 3}', '{"sqlite:///x": {"runs": []}}', "\0"])
def test_a_damaged_file_of_recent_runs_offers_nothing(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", str(tmp_path))
    (tmp_path / FILE_NAME).write_text(content.replace("sqlite:///x", f"sqlite:///{Path('x').absolute()}"))
    assert recent_runs("sqlite:///x") == []
    remember("sqlite:///x", runs={"a": "b"})
    assert recent_runs("sqlite:///x") == [("a", "b")]
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", "/dev/null/x")
    remember("sqlite:///x", runs={"a": "b"})  # cannot be written: no error


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"sqlite:///x": {"runs": {"\\ud800": "b", "\\u001b[2J": "c"}}}',
        '{"x": "' + "x" * (1 << 20) + '"}',
    ],
    ids=["deep", "unprintable", "large"],
)
def test_a_hostile_file_of_recent_runs_offers_nothing(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_a_damaged_file_of_recent_runs_offers_nothing(content, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_recent_runs_are_read_from_a_plain_file_only(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHUFFLENET_CACHE_DIR", str(tmp_path))
    if kind == "device":
        (tmp_path / FILE_NAME).symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / FILE_NAME)
    assert recent_runs("sqlite:///x") == []
    remember("sqlite:///x", runs={"a": "b"})
    assert recent_runs("sqlite:///x") == [("a", "b")]


@pytest.mark.long
def test_completion_from_a_server(server: "object", client: MlflowClient) -> None:
    uri = server.uri  # type: ignore[attr-defined]
    store_client = MlflowClient(uri)
    run_id = store_client.create_run(store_client.create_experiment("completion"), run_name="a run").info.run_id
    store_client.create_registered_model("pets")
    version = store_client.create_model_version("pets", "s3://bucket/models", run_id)
    store_client.set_registered_model_alias("pets", "champion", version.version)
    assert (run_id, "a run") in recent_runs(uri)
    assert aliases(uri) == [("pets@champion", "version 1")]
