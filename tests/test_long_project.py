"""`mlflow run`, the wheel, and a checkout that is not installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from tests.support.command_line import Invoke
from tests.support.effort import cases, only_in_full_run
from tests.support.metrics import steps
from tests.support.network import free_port
from tests.support.processes import wait_for_iteration
from tests.support.training import run_until

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that a clone would have."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    folder.mkdir()
    for name in ("shufflenet_mlflow", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("MLproject", "conda.yaml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def mlflow_run(checkout: object, *arguments: object, **parameters: object) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "mlflow", "run", str(checkout), "--env-manager=local", *map(str, arguments)]
    for name, value in parameters.items():
        words += ["-P", f"{name}={value}"]
    # Entry points call `python`: that of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)


def newest_run(client: MlflowClient) -> Run:
    runs = client.search_runs(
        [item.experiment_id for item in client.search_experiments()], order_by=["attributes.start_time DESC"]
    )
    assert runs
    return runs[0]


def test_train_and_eval(checkout: Path, client: MlflowClient, images: Path) -> None:
    result = mlflow_run(
        checkout,
        *("--experiment-name", "with spaces"),
        train_dir=images / "train",
        val_dir=images / "val",
        input_size=32,
        batch_size=8,
        total_iters=6,
        lr="1e-2",
        run_name="a name with spaces",
    )
    assert result.returncode == 0, result.stderr
    trained = newest_run(client)
    assert (trained.info.status, trained.info.run_name) == ("FINISHED", "a name with spaces")
    assert trained.data.tags["mlflow.project.entryPoint"] == "main"
    assert (trained.data.params["lr"], trained.data.params["resolved/lr"]) == ("1e-2", "0.01")
    assert json.loads(trained.data.tags["checkpoint.latest"])["iters"] == 6
    result = mlflow_run(checkout, "-e", "eval", checkpoint=f"{trained.info.run_id}@latest")
    assert result.returncode == 0, result.stderr
    evaluated = newest_run(client)
    assert evaluated.info.run_id != trained.info.run_id
    assert evaluated.info.status == "FINISHED"
    assert evaluated.data.metrics["val/top1"] == trained.data.metrics["val/top1"]


def test_runs_land_where_all_others_are(checkout: Path, client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    """Told no experiment, MLflow makes its run in `Default`: that one stands for the run, and says so."""
    folders = {"train_dir": images / "train", "val_dir": images / "val"}
    result = mlflow_run(checkout, **folders, input_size=32, batch_size=8, total_iters=2, workers=0, job="pets")
    assert result.returncode == 0, result.stderr
    [run] = client.search_runs([client.get_experiment_by_name("shufflenet").experiment_id])
    assert (run.info.status, run.data.tags["mlflow.project.entryPoint"]) == ("FINISHED", "main")
    assert run.data.tags["mlflow.source.name"] == "shufflenet train"
    [made] = client.search_runs(["0"])
    assert (made.info.status, made.data.tags["continues.run"]) == ("FINISHED", run.info.run_id)
    assert [row["run_id"] for row in json.loads(shufflenet("runs", "--json").stdout)] == [run.info.run_id]
    evaluated = json.loads(shufflenet("eval", made.info.run_id, "--json").stdout)
    assert evaluated["run_id"] == run.info.run_id
    result = mlflow_run(checkout, **folders, input_size=32, batch_size=8, total_iters=2, workers=0, job="pets")
    assert result.returncode == 0, result.stderr
    assert len(client.search_runs([run.info.experiment_id])) == 1  # the job was found, and continued
    assert client.search_runs(["0"])[0].data.tags["continues.run"] == run.info.run_id
    result = mlflow_run(checkout, "-e", "eval", checkpoint=run.info.run_id)
    assert result.returncode == 0, result.stderr
    [evaluation] = client.search_runs([run.info.experiment_id], "tags.`evaluated.run` != ''")
    assert client.search_runs(["0"])[0].data.tags["continues.run"] == evaluation.info.run_id


@only_in_full_run
def test_resuming_continues_the_run_and_says_so_in_the_one_that_mlflow_made(
    checkout: Path, client: MlflowClient, images: Path
) -> None:
    stopped = run_until(images, "training", 5)
    result = mlflow_run(checkout, resume=stopped.run_id, workers=0)
    assert result.returncode == 0, result.stderr
    assert client.get_run(stopped.run_id).info.status == "FINISHED"
    assert steps(client, stopped.run_id, "train/loss") == [2, 4, 6, 8, 10, 12]
    wrapper_run = newest_run(client)
    assert wrapper_run.info.run_id != stopped.run_id
    assert (wrapper_run.info.status, wrapper_run.data.tags["continues.run"]) == ("FINISHED", stopped.run_id)
    assert wrapper_run.data.metrics == {}


def test_failure_is_failure(checkout: Path, client: MlflowClient) -> None:
    result = mlflow_run(checkout, "-e", "train", train_dir="nowhere", val_dir="nowhere")
    assert result.returncode != 0
    assert "does not exist" in result.stderr
    assert newest_run(client).info.status == "FAILED"
    result = mlflow_run(checkout, "-e", "eval", checkpoint="nowhere")
    assert result.returncode != 0
    assert newest_run(client).info.status == "FAILED"


def test_the_bare_checkout_runs(checkout: Path) -> None:
    """Without the editable installation's finder, `shufflenet_mlflow.cli` is the folder `cli` beside the package."""
    code = (
        "import runpy, sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "sys.argv = ['shufflenet', '--version']\n"
        "runpy.run_module('shufflenet_mlflow', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("shufflenet, version"), result.stderr


def test_the_wheel(checkout: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(checkout)], check=True
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.partition("/")[0] for name in names}
    assert len(tops) == 2
    assert "shufflenet_mlflow" in tops
    assert {"shufflenet_mlflow/cli/train.py", "shufflenet_mlflow/py.typed"} <= set(names)
    code = "import shufflenet_mlflow.cli as cli; print(cli.__file__); cli.main(['--version'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[0].startswith(str(tmp_path / "site"))


# ---------------------------------------------------------------- other ways to name the project, other endings


def git(*words: object, cwd: Path) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", *identity, *map(str, words)], cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the bare repositories in `folder`: MLflow would take one on the disk for a plain folder."""
    port = free_port()
    daemon = subprocess.Popen(
        ["git", "daemon", "--export-all", f"--base-path={folder}", "--listen=127.0.0.1", f"--port={port}", str(folder)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"git://127.0.0.1:{port}"
        [first] = folder.iterdir()
        deadline = time.monotonic() + 30
        while subprocess.run(
            ["git", "ls-remote", f"{address}/{first.name}"], capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < deadline
        yield address
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def mlflow_run_small(uri: str, images: Path) -> "subprocess.CompletedProcess[str]":
    return mlflow_run(
        uri,
        **small_parameters(images),
        total_iters=4,
        weight_decay="5E-5",
        sync_bn="false",
        run_name="it's one",
    )


@only_in_full_run
def test_from_a_git_uri(checkout: Path, client: MlflowClient, images: Path, tmp_path: Path) -> None:
    """MLflow clones the repository, and the run names the commit."""
    work = tmp_path / "work"
    shutil.copytree(checkout, work)
    git("init", "--quiet", cwd=work)
    git("add", "--all", cwd=work)
    git("commit", "--quiet", "--message", "first", cwd=work)
    commit = git("rev-parse", "HEAD", cwd=work)
    git("clone", "--quiet", "--bare", work, tmp_path / "bare" / "project.git", cwd=tmp_path)
    with served(tmp_path / "bare") as address:
        result = mlflow_run_small(f"{address}/project.git", images)
    assert result.returncode == 0, result.stderr
    run = newest_run(client)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "it's one")
    assert run.data.tags["mlflow.source.git.commit"] == commit
    assert run.data.tags["mlflow.source.git.dirty"] == "false"
    assert (run.data.params["resolved/weight_decay"], run.data.params["sync_bn"]) == ("5e-05", "false")


@only_in_full_run
def test_from_a_parent_folder(
    checkout: Path, client: MlflowClient, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.parent)
    result = mlflow_run(checkout.name, *("-e", "train"), **small_parameters(images), total_iters=2)
    assert result.returncode == 0, result.stderr
    assert newest_run(client).info.status == "FINISHED"


def small_parameters(images: Path) -> dict[str, object]:
    return {
        "train_dir": images / "train",
        "val_dir": images / "val",
        "input_size": 32,
        "batch_size": 8,
        "workers": 0,
        "no_log_models": "true",
    }


@pytest.mark.parametrize(
    ("signum", "receiver"),
    cases(
        [
            (signal.SIGTERM, "mlflow run alone"),
            (signal.SIGINT, "everyone"),  # Ctrl-C in a terminal
            (signal.SIGKILL, "mlflow run alone"),
            (signal.SIGTERM, "everyone"),
        ],
        ci=2,
    ),
)
def test_a_signal_ends_run_and_process(
    checkout: Path, client: MlflowClient, images: Path, tmp_path: Path, signum: int, receiver: str
) -> None:
    """No run is left RUNNING, no process survives, and there is a checkpoint to resume from."""
    words = [f"{name}={value}" for name, value in small_parameters(images).items()]
    words += ["total_iters=100000", "display_interval=5", f"save_dir={tmp_path / 'models'}"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "run", str(checkout), "--env-manager=local"),
            *(part for word in words for part in ("-P", word)),
        ],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_iteration(process, 10)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("shufflenet_mlflow" in child.cmdline() for child in children)
    if receiver == "everyone":
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    process.communicate()
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left
    run = newest_run(client)
    # After Ctrl-C MLflow 3.17 writes FAILED over whatever its own run says of itself, but not over this one.
    assert run.info.status == "KILLED"
    latest = json.loads(run.data.tags["checkpoint.latest"])
    assert latest["iters"] >= 10
    assert verify_checkpoint(tmp_path / "models" / Path(latest["path"]).name) is None
