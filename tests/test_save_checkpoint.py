"""`save_checkpoint` and `CheckpointWriter`: no file of another run is overwritten, and MLflow is not waited for."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import CheckpointWriter, get_latest_model, load_checkpoint, read_checkpoint, save_checkpoint
from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest, read_manifest
from shufflenet_mlflow.errors import CheckpointError, ConfigError, TrackingError, UnresolvedError
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import courier
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.lease import Writer
from shufflenet_mlflow.tracking.names import WRITER_TAG
from shufflenet_mlflow.workflows.sync import run_sync
from tests.support.command_line import Invoke
from tests.support.metrics import steps
from tests.support.network import free_port


def state(value: float = 1.0) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((3,), value)}}


def weight(path: Path | None) -> float:
    assert path is not None
    return float(read_checkpoint(path)["state_dict"]["w"][0])


def tagged(client: MlflowClient, run_id: str, tag: str) -> CheckpointManifest:
    return CheckpointManifest.from_json(client.get_run(run_id).data.tags[tag])


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("scripts")).info.run_id)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    while _couriers := courier._couriers:
        _couriers.popitem()[1].close()
    while mlflow.active_run():
        mlflow.end_run()


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a switch: while `on`, no file can be uploaded."""

    class Away:
        on = True

    put, away = RunArtifacts.put_file, Away()

    def put_file(self: RunArtifacts, *arguments: Any) -> Any:
        if away.on:
            raise ConnectionError("Connection refused")
        return put(self, *arguments)

    monkeypatch.setattr(RunArtifacts, "put_file", put_file)
    return away


# ---------------------------------------------------------------- whose file is whose


def test_each_run_has_a_folder_of_its_own(client: MlflowClient) -> None:
    found = {}
    with mlflow.start_run() as first:
        assert get_latest_model() == (None, 0)
        save_checkpoint(state(1), 5)
        with mlflow.start_run(nested=True) as second:
            path = save_checkpoint(state(2), 5)
            found[2] = get_latest_model()[0]
        found[1] = get_latest_model()[0]
    assert path == Path("models", second.info.run_id, "checkpoint-000005.pth.tar")
    assert {value: weight(path) for value, path in found.items()} == {1: 1.0, 2: 2.0}
    assert weight(get_latest_model(first.info.run_id)[0]) == 1.0
    save_checkpoint(state(3), 5)  # without a run
    assert (weight(get_latest_model()[0]), weight(found[1])) == (3.0, 1.0)


def test_what_earlier_versions_wrote_is_found_by_its_own_run() -> None:
    with mlflow.start_run():
        save_checkpoint(state(1), 5, directory="models")
        assert get_latest_model()[1] == 5
    with mlflow.start_run():
        assert get_latest_model() == (None, 0)


def test_an_active_run_is_continued_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with mlflow.start_run() as run:
        save_checkpoint(state(1), 5)
    monkeypatch.chdir(tmp_path)
    with mlflow.start_run(run_id=run.info.run_id):
        path, iters = get_latest_model(cache_dir=tmp_path / "cache")
        assert (weight(path), iters) == (1.0, 5)
        save_checkpoint(state(2), 6)

        def dead(*_arguments: object) -> None:
            raise ConnectionError("Connection refused")

        monkeypatch.setattr(MlflowClient, "get_run", dead)
        assert get_latest_model()[1] == 6
    assert "only this machine's checkpoints are considered" in caplog.text


def test_any_reference_can_be_read_and_loaded(run_id: str) -> None:
    for iters in (1, 2):
        save_checkpoint(state(iters), iters, run_id=run_id, val_top1=1 / iters)
    assert read_checkpoint(f"runs:/{run_id}@best")["iters"] == 1
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(3))})
    assert load_checkpoint(module, run_id).is_complete
    assert float(module["w"][0].detach()) == 2.0
    assert load_checkpoint(module, state(7)).is_complete
    with pytest.raises(CheckpointError, match="'nowhere' does not exist"):
        load_checkpoint(module, "nowhere")


def test_no_file_of_another_run_is_overwritten() -> None:
    with mlflow.start_run() as first:
        path = save_checkpoint(state(1), 5, directory="shared")
        save_checkpoint(state(2), 5, directory="shared")  # its own
    with mlflow.start_run(), pytest.raises(CheckpointError, match=f"belongs to run {first.info.run_id}"):
        save_checkpoint(state(3), 5, directory="shared")
    with pytest.raises(CheckpointError, match="give another directory="):
        save_checkpoint(state(3), 5, directory="shared")
    assert weight(path) == 2.0
    path.write_bytes(path.read_bytes()[:50])  # damaged: of no run
    save_checkpoint(state(3), 5, directory="shared")
    assert weight(path) == 3.0


# ---------------------------------------------------------------- MLflow is away


def test_an_outage_neither_raises_nor_loses_anything(
    client: MlflowClient, run_id: str, away: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for iters in (1, 2):
        save_checkpoint(state(iters), iters, loss=0.5, run_id=run_id)
    warnings = [record for record in caplog.records if "training goes on" in record.message]
    assert len(warnings) == 1
    assert len(read_pending(Path("models", run_id)).entries) == 2
    away.on = False
    save_checkpoint(state(3), 3, loss=0.5, run_id=run_id)  # MLflow is tried again within seconds
    courier.finish_all()
    assert steps(client, run_id, "loss") == [1, 2, 3]
    assert tagged(client, run_id, LATEST_TAG).iters == 3
    assert not read_pending(Path("models", run_id)).entries


def test_a_server_that_hangs_is_not_waited_for(
    client: MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, read = threading.Event(), MlflowClient.get_run

    def get_run(self: MlflowClient, run_id: str) -> Any:
        answers.wait()
        return read(self, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run)
    monkeypatch.setattr(courier, "STORE_SECONDS", 0.2)
    monkeypatch.setattr(courier, "TELLING_SECONDS", 0.0)
    for iters in (1, 2):
        save_checkpoint(state(), iters, loss=0.5, run_id=run_id)  # returns, although nothing has answered
    assert [record.message for record in caplog.records if "has not answered within" in record.message]
    answers.set()
    courier.finish_all()
    assert steps(client, run_id, "loss") == [1, 2]


def test_sync_takes_over_from_the_script(client: MlflowClient, run_id: str, away: Any) -> None:
    save_checkpoint(state(), 1, loss=0.5, run_id=run_id)
    away.on = False
    folder = Path("models", run_id)
    run_sync(folder, dry_run=False, tracking_uri=None, reporter=LoggingReporter(), stop=StopFlag())
    assert steps(client, run_id, "loss") == [1]
    save_checkpoint(state(), 2, loss=0.5, run_id=run_id)
    assert steps(client, run_id, "loss") == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("background", [False, True])
def test_the_end_of_the_process_says_what_stays(background: bool, tmp_path: Path) -> None:
    script = (
        "import mlflow, torch\n"
        "from shufflenet_mlflow import save_checkpoint\n"
        "for iters in (1, 2):\n"
        "    save_checkpoint({'state_dict': {'w': torch.ones(3)}}, iters, run_id='0' * 32, background=BACKGROUND)\n"
    ).replace("BACKGROUND", str(background))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": "", "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"`shufflenet sync models/{'0' * 32}`" in done.stderr
    assert done.stderr.count("refused; training goes on") == 1
    assert done.stderr.count("has not answered within") <= 1, "before that, if the machine is slow"
    assert "Traceback" not in done.stderr
    assert len(read_pending(tmp_path / "models" / ("0" * 32)).entries) == 2


# ---------------------------------------------------------------- MLflow refuses


def test_a_run_that_does_not_exist(client: MlflowClient) -> None:
    with pytest.raises(TrackingError, match="not found; the checkpoint checkpoint-000001.pth.tar is on the disk"):
        save_checkpoint(state(), 1, run_id="0" * 32)
    assert len(read_pending(Path("models", "0" * 32)).entries) == 1


def test_a_metric_that_mlflow_refuses(client: MlflowClient, run_id: str) -> None:
    with pytest.raises(TrackingError, match="Invalid value .* for parameter 'metrics\\[0\\].name'|kept in"):
        save_checkpoint(state(), 1, metrics={"f1?": 0.5}, run_id=run_id)


# ---------------------------------------------------------------- metrics, and what is best


def test_the_metric_that_decides(client: MlflowClient, run_id: str) -> None:
    for iters, error in enumerate((0.5, 0.25, 0.75), start=1):
        metrics = {"error": torch.tensor(error), "f1": np.float32(0.5), "absent": None}
        save_checkpoint(
            state(iters),
            iters,
            loss=9.0,
            metrics=metrics,
            monitor="error",
            mode="min",
            run_id=run_id,  # type: ignore[arg-type]
        )
    best = tagged(client, run_id, BEST_TAG)
    assert (best.iters, best.monitor, best.mode, best.value) == (2, "error", "min", 0.25)
    assert tagged(client, run_id, LATEST_TAG).iters == 3
    assert set(client.get_run(run_id).data.metrics) == {"error", "f1"}
    assert steps(client, run_id, "error") == [1, 2, 3]
    assert weight(get_latest_model(f"runs:/{run_id}@best")[0]) == 2.0
    kept = read_manifest(Path("models", run_id, "checkpoint-000002.pth.tar"))
    assert kept is not None
    assert kept.score == -0.25


def test_a_metric_that_is_not_there(run_id: str) -> None:
    with pytest.raises(ConfigError, match="monitor \\(='f1'\\) must be one of the metrics: loss"):
        save_checkpoint(state(), 1, metrics={"loss": 1.0}, monitor="f1")
    with pytest.raises(ConfigError, match="mode \\(='lowest'\\) must be"):
        save_checkpoint(state(), 1, metrics={"loss": 1.0}, monitor="loss", mode="lowest")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="metrics\\['f1'\\] is a str"):
        save_checkpoint(state(), 1, metrics={"f1": "high"})  # type: ignore[dict-item]
    assert not Path("models").exists()


def test_numbers_of_numpy_and_torch() -> None:
    values = {"epoch": np.int64(3), "loss": torch.tensor(0.5), "lr": np.float32(0.25), "flags": [np.bool_(True)]}
    payload = read_checkpoint(save_checkpoint({**state(), **values}, 1))
    assert (payload["epoch"], payload["loss"], payload["lr"], payload["flags"]) == (3, 0.5, 0.25, [True])
    with pytest.raises(CheckpointError, match=r"loss is a Tensor of shape \(2,\); give a number"):
        save_checkpoint(state(), 1, loss=torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), [torch.zeros(2)]])
def test_a_state_that_is_no_dict(given: Any) -> None:
    with pytest.raises(CheckpointError, match='give a dict, such as {"model": model}'):
        save_checkpoint(given, 1)


# ---------------------------------------------------------------- in the background


def test_in_the_background_from_a_copy_and_in_order(client: MlflowClient, run_id: str) -> None:
    w = torch.zeros(3)
    with CheckpointWriter(run_id=run_id) as writer:
        for iters in (1, 2, 3):
            w.fill_(iters)
            path = writer.save({"state_dict": {"w": w}}, iters, loss=0.5)
            w.fill_(9)  # training goes on
        writer.wait()
        assert weight(path) == 3.0
    assert weight(path.with_name("checkpoint-000001.pth.tar")) == 1.0
    assert steps(client, run_id, "loss") == [1, 2, 3]


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    writer = CheckpointWriter(file)
    writer.save(state(), 1)
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        writer.wait()
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"), CheckpointWriter(file) as writer:
        writer.save(state(), 1)
    with pytest.raises(ZeroDivisionError), CheckpointWriter(file) as writer:  # the block's own error
        writer.save(state(), 1)
        raise ZeroDivisionError


def test_save_checkpoint_in_the_background(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [save_checkpoint(state(iters), iters, background=True) for iters in (1, 2)]
    paths.append(save_checkpoint(state(3), 3))  # after what was given before
    assert [weight(path) for path in paths] == [1.0, 2.0, 3.0]
    script = (
        "import torch\n"
        "from shufflenet_mlflow import save_checkpoint\n"
        "save_checkpoint({'state_dict': {'w': torch.ones(3)}}, 1, background=True)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    assert weight(tmp_path / "models" / "checkpoint-000001.pth.tar") == 1.0


@pytest.mark.long
def test_the_loop_of_the_documentation_resumes_on_another_machine(
    client: MlflowClient, tmp_path: Path, workplace: Path
) -> None:
    """It is killed after 20 of 40 iterations, and ends with the weights of a loop that was not."""
    page = (Path(__file__).parents[1] / "docs" / "own-loop.md").read_text()
    loop = page.split("```python\n")[1].split("```")[0]

    def train(name: str, code: str, **environment: str) -> str:
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / name,
            env={**os.environ, "SHUFFLENET_CACHE_DIR": str(tmp_path / name / "cache"), **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    whole = train("undisturbed", loop)
    train(
        "killed",
        loop.replace(
            "save_checkpoint(state,",
            "iters == 30 and __import__('os')._exit(9)\n" + " " * 12 + "save_checkpoint(state,",
        ),
    )
    [killed] = [run for run in client.search_runs(["0"]) if "RUNNING" in run.info.status]
    resumed = train("elsewhere", loop, MLFLOW_RUN_ID=killed.info.run_id)
    assert resumed.split(":")[1] == whole.split(":")[1]
    states = [
        read_checkpoint(line.split()[1].rstrip(":"), cache_dir=tmp_path)["state_dict"] for line in (whole, resumed)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert steps(client, killed.info.run_id, "loss") == [10, 20, 30, 40]


def test_ls_shows_the_metric_that_decides(tmp_path: Path, shufflenet: Invoke) -> None:
    for iters, error in ((1, 0.5), (2, 0.25)):
        metrics = {"loss": 2.0, "error": error}
        save_checkpoint(state(), iters, metrics=metrics, monitor="error", mode="min", directory=tmp_path)
    listed = shufflenet("checkpoints", "ls", tmp_path)
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert lines[0][:4] == ["iters", "epoch", "loss", "error"]
    assert [line[2:4] for line in lines[1:]] == [["2.0000", "0.2500"], ["2.0000", "0.5000"]]
    row = json.loads(shufflenet("checkpoints", "ls", tmp_path, "--json").stdout)[0]
    assert (row["monitor"], row["value"], row["loss"], row["best"]) == ("error", 0.25, 2.0, True)
    save_checkpoint(state(), 3, val_top1=0.75, directory=tmp_path)
    listed = shufflenet("checkpoints", "ls", tmp_path)
    assert [line.split()[3] for line in listed.stdout.splitlines()] == [
        *("score", "val_top1=0.7500", "error=0.2500", "error=0.5000")
    ]


# ---------------------------------------------------------------- what attackers tried


def another_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_run_that_another_process_trains_is_left_alone(client: MlflowClient, run_id: str) -> None:
    """The refusal names the owner; once that has ended, a script's checkpoints are welcome."""
    save_checkpoint(state(), 1, metrics={"loss": 1.0}, run_id=run_id, directory="before")
    with another_process() as child:
        born = psutil.Process(child.pid).create_time()
        writer = replace(Writer.here("f" * 16, 1), pid=child.pid, born=born)
        client.set_tag(run_id, WRITER_TAG, writer.to_tag()[WRITER_TAG])
        with pytest.raises(TrackingError, match=f"run {run_id} is being trained by process {child.pid} on "):
            save_checkpoint(state(), 7777, metrics={"loss": 9.0}, run_id=run_id, directory="foreign")
        child.communicate(b"\n")
    assert tagged(client, run_id, LATEST_TAG).iters == 1
    assert steps(client, run_id, "loss") == [1]
    save_checkpoint(state(), 2, metrics={"loss": 2.0}, run_id=run_id, directory="after")
    assert tagged(client, run_id, LATEST_TAG).iters == 2


@pytest.mark.long
def test_two_processes_do_not_save_in_one_run_s_folder(client: MlflowClient, run_id: str) -> None:
    """The second is refused before it has written anything, and has the folder once the first has ended."""
    code = (
        "import sys, torch\nfrom shufflenet_mlflow import save_checkpoint\n"
        "save_checkpoint({'state_dict': {'w': torch.ones(3)}}, 1, metrics={'loss': 1.0}, run_id=sys.argv[1])\n"
        "print('saved', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, run_id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "saved\n"
        path = Path("models", run_id, "checkpoint-000001.pth.tar")
        before = path.read_bytes()
        with pytest.raises(TrackingError, match=f"in use by process {first.pid}; .* nothing was written"):
            save_checkpoint(state(), 1, metrics={"loss": 9.0}, run_id=run_id)
        assert path.read_bytes() == before
        first.communicate()
    save_checkpoint(state(1), np.int64(2), metrics={"loss": 2.0}, run_id=run_id)
    assert steps(client, run_id, "loss") == [1, 2]
    assert {weight(file) for file in Path("models", run_id).glob("*.tar")} == {1.0}


ENDS = {
    "a writer that nobody closes": "w = CheckpointWriter('m')\nfor i in (1, 2, 3): w.save(state(i), i)",
    "a thread that outlives the main one": (
        "def work():\n    for i in (1, 2, 3): save_checkpoint(state(i), i, directory='m', background=True)\n"
        "threading.Thread(target=work).start()"
    ),
    "a function called at exit": (
        "atexit.register(lambda: [save_checkpoint(state(i), i, directory='m', background=True) for i in (1, 2, 3)])"
    ),
    "a forked process": (
        "w = CheckpointWriter('m').__enter__()\nw.save(state(1), 1)\n"
        "if os.fork() == 0: w.save(state(2), 2)\nelse: os.wait(); w.save(state(3), 3)"
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("ends", ENDS)
def test_no_end_of_a_process_loses_what_was_saved_in_the_background(ends: str, tmp_path: Path) -> None:
    code = (
        "import atexit, os, threading, torch\nfrom shufflenet_mlflow import CheckpointWriter, save_checkpoint\n"
        f"state = lambda value: {{'state_dict': {{'w': torch.full((4_000_000,), float(value))}}}}\n{ENDS[ends]}\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # OpenMP's threads do not survive a fork
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [tmp_path / "m" / f"checkpoint-00000{iters}.pth.tar" for iters in (1, 2, 3)]
    assert [weight(path) for path in found] == [1.0, 2.0, 3.0]


def test_where_no_thread_starts_any_more_it_waits_for_sync(
    client: MlflowClient, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the end of the interpreter, from Python 3.12 on."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for iters in (1, 2):
            save_checkpoint(state(iters), iters, run_id=run_id, directory=tmp_path)
    assert "`shufflenet sync" in caplog.text
    run_sync(tmp_path, dry_run=False, tracking_uri=None, reporter=LoggingReporter(), stop=StopFlag())
    assert tagged(client, run_id, LATEST_TAG).iters == 2
    assert steps(client, run_id, "loss") == []


def test_what_fails_behind_an_error_of_the_block_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-000002.pth.tar").mkdir()
    with pytest.raises(ValueError, match="mine"), CheckpointWriter(tmp_path) as writer:
        writer.save(state(), 2)
        raise ValueError("mine")
    assert "checkpoint-000002.pth.tar" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iters": True}, r"iters \(=True\) must be an integer"),
        ({"iters": 10**30}, r"iters \(=10{30}\) must be an integer"),
        ({"epoch": -1}, r"epoch \(=-1\) must not be negative"),
        ({"run_id": 3}, r"run_id \(=3\) must be text"),
        ({"metrics": [1]}, r"metrics \(=\[1\]\) must be a dict"),
        ({"metrics": {"a": 10**400}}, r"metrics\['a'\] is beyond 9e\+15"),
        ({"tag": 3}, "the tag 3 may hold"),
        ({"tag": "x" * 300}, "the tag 'x+' may hold up to 100 letters"),
        ({"directory": 3}, r"directory \(=3\) must be a path"),
        ({"directory": "a\0b"}, r"directory \(='a\\x00b'\) holds a NUL character"),
    ],
)
def test_arguments_of_no_use_are_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        save_checkpoint(state(), **{"iters": 1, "directory": tmp_path, **given})
    assert not list(tmp_path.iterdir())


def test_states_of_no_use_are_named(tmp_path: Path) -> None:
    nested = state()
    nested["again"] = nested
    with pytest.raises(
        CheckpointError, match="state holds lists or dicts that are nested too deeply, or in themselves"
    ):
        save_checkpoint(nested, 1, directory=tmp_path)
    with pytest.raises(CheckpointError, match=r"state\['m'\] is a tensor on the device meta, which has no values"):
        save_checkpoint({**state(), "m": torch.ones(3, device="meta")}, 1, directory=tmp_path)
    save_checkpoint(state(), 1, loss=-1, val_top1=1, directory=tmp_path)
    kept = read_manifest(tmp_path / "checkpoint-000001.pth.tar")
    assert kept is not None
    assert (kept.loss, kept.val_top1) == (-1.0, 1.0)


@pytest.mark.parametrize("ref", [None, 3, b"x", "a\0b"])
def test_references_of_no_use_are_named(ref: Any) -> None:
    with pytest.raises(UnresolvedError, match="is neither text nor a path|holds a NUL character"):
        load_checkpoint(torch.nn.Linear(1, 1), ref)


def test_an_entry_of_the_script_called_run_id_is_the_scripts_own() -> None:
    for iters in (1, 1):
        save_checkpoint({**state(), "run_id": "wandb-1"}, iters, directory="own")
    assert read_checkpoint(Path("own", "checkpoint-000001.pth.tar"))["run_id"] == "wandb-1"


def test_a_checkpoint_that_was_copied_to_the_name_of_another(caplog: pytest.LogCaptureFixture) -> None:
    for iters in (1, 2, 3):
        save_checkpoint(state(), iters, directory="own")
    first, third = (Path("own", f"checkpoint-00000{number}.pth.tar") for number in (1, 3))
    for suffix in ("", ".json"):
        shutil.copy(f"{first}{suffix}", f"{third}{suffix}")
    path, iters = get_latest_model("own")
    assert (path, iters) == (Path("own", "checkpoint-000002.pth.tar"), 2)
    assert "is another checkpoint: its manifest is that of 'checkpoint-000001.pth.tar', iteration 1" in caplog.text


def test_errors_name_the_argument() -> None:
    Path("file").write_text("")
    with pytest.raises(CheckpointError, match=r"earlier checkpoints are intact; give another directory=$"):
        save_checkpoint(state(), 1, directory="file/below")
