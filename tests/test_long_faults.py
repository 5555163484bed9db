"""Guarantees 2 and 5 under attack: every way in which a request can go wrong, at every time of a run.

Whatever answers in the server's place, nothing stops or stalls, nothing is lost, and everything arrives once.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import new_provisional_id
from shufflenet_mlflow.tracking.messages import Finish, MetricPoints, Params, TextArtifact, to_body
from shufflenet_mlflow.tracking.run import new_run
from tests.support import proxy as proxies
from tests.support.command_line import small_options
from tests.support.effort import cases, repetitions
from tests.support.metrics import steps
from tests.support.mlflow_server import Server
from tests.support.processes import Process, finish, start, wait_for_iteration
from tests.support.proxy import FAULTS, Proxy

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ITERATIONS = 100
SAVE_EVERY = 25
REQUEST_SECONDS = 5
"""Seconds that an exchange may take here, so that late answers come after them soon."""
PATIENCE = 100.0
"""Seconds that a process may take to start, or to end after its last iteration, several at once on a busy machine."""

SEED = int(os.environ.get("GITHUB_RUN_NUMBER", "0"))
CHOSEN = random.Random(SEED).sample(FAULTS, repetitions(full=len(FAULTS), ci=1))
"""In CI, each run tries another fault."""


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "LATE_SECONDS", REQUEST_SECONDS + 3.0)
    monkeypatch.setattr(proxies, "TRICKLE_SECONDS", 1.0)


@contextmanager
def proxy_of(server: Server, mode: str = "pass") -> Iterator[Proxy]:
    with closing(Proxy(server)) as proxy:
        proxy.mode = mode
        yield proxy


def shufflenet(folder: Path, uri: str, *words: object) -> Process:
    env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS)}
    return start(folder, *words, env=env)


def end(process: Process, seconds: float = PATIENCE) -> tuple[int, str, str]:
    """Wait for the end of a command, which must be that of one which foresaw everything."""
    try:
        out, err = process.communicate(timeout=seconds)
    except Exception:
        process.kill()
        process.communicate()
        raise
    assert process.returncode in (0, 1), err
    assert "Traceback" not in err
    assert "<" not in err.replace("<unknown>", "")
    if process.returncode == 1:
        assert len([line for line in err.splitlines() if line.startswith("Error: ")]) == 1, err
    return process.returncode, out, err


def all_runs(server: Server, experiment: str) -> list[Run]:
    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else client.search_runs([found.experiment_id], run_view_type=ViewType.ALL)


def only_run(server: Server, experiment: str) -> Run:
    """Return the only run of an experiment; requests to create it that came late have left no other."""
    runs = all_runs(server, experiment)
    assert not [run for run in runs if run.info.status == "RUNNING"]
    [run] = [run for run in runs if run.info.lifecycle_stage == "active"]
    assert run.info.status == "FINISHED"
    return run


def train(server: Server, images: Path, folder: Path, mode: str, when: str) -> None:
    """Train through a proxy that errs at that time, then deliver the rest."""
    experiment = f"{mode} {when}"
    options = ["--total-iters", ITERATIONS, "--save-interval", SAVE_EVERY, "--val-interval", ITERATIONS]
    with proxy_of(server, mode if when == "start" else "pass") as proxy:
        words = ["train", *small_options(images), *options, "--save-dir", "m", "--experiment", experiment, "--json"]
        process = shufflenet(folder, proxy.uri, *words)
        if when != "start":
            wait_for_iteration(process, 20 if when == "middle" else ITERATIONS - 30)
            proxy.mode = mode
        if when != "end":
            wait_for_iteration(process, 60)
            proxy.mode = "pass"
        wait_for_iteration(process, ITERATIONS)
        status, out, err = end(process)
        assert status == 0, err
        ended = json.loads(out)
        assert ended["iters"] == ITERATIONS
        if ended["pending"]:
            if when == "end" and mode != "slow":
                status, _, err = end(shufflenet(folder, proxy.uri, "sync", "m", "--json"))
                assert status == 1 or proxy.modes[mode] == 0, err
            proxy.mode = "pass"
            synced = finish(shufflenet(folder, proxy.uri, "sync", "m", "--json"))
            assert (synced["pending"], synced["refused"]) == (0, 0)
    check(server, only_run(server, experiment), folder / "m")
    assert not (folder / "m" / "spool.refused.jsonl").exists()


def check(server: Server, run: Run, directory: Path) -> None:
    """Check that everything of a run has arrived once, and the checkpoints that its folder still has."""
    client, run_id = MlflowClient(server.uri), run.info.run_id
    every = list(range(SAVE_EVERY, ITERATIONS + 1, SAVE_EVERY))
    assert steps(client, run_id, "train/loss") == list(range(2, ITERATIONS + 1, 2))
    assert steps(client, run_id, "val/top1") == [ITERATIONS]
    assert set(steps(client, run_id, "loss")) >= set(every)
    assert len(steps(client, run_id, "loss")) == len(set(steps(client, run_id, "loss")))
    assert json.loads(run.data.tags["checkpoint.latest"])["iters"] == ITERATIONS
    uploads = Path(server.folder) / "artifacts" / run.info.experiment_id / run_id / "artifacts" / "checkpoints"
    kept = list_checkpoints(directory)
    assert kept[0].name == f"bnps-checkpoint-{ITERATIONS:06}.pth.tar"
    assert all((uploads / path.name).read_bytes() == path.read_bytes() for path in kept)
    assert len(run.inputs.dataset_inputs) == 2


@pytest.mark.parametrize("mode", cases(CHOSEN, ci=1))
def test_a_run_survives_it_at_every_time(mode: str, server: Server, images: Path, tmp_path: Path) -> None:
    times = ("start", "middle", "end")
    with ThreadPoolExecutor(len(times)) as pool:  # most of the time they wait
        trials = [pool.submit(train, server, images, tmp_path / when, mode, when) for when in times]
    for trial in trials:
        trial.result()


@pytest.fixture(scope="module")
def two_runs(server: Server, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("two")
    words = ["train", *small_options(images), "--experiment", "two", "--json"]
    both = [start(folder / name, *words, env={"MLFLOW_TRACKING_URI": server.uri}) for name in "ab"]
    first, second = [finish(process)["run_id"] for process in both]
    return first, second


def write_journal(server: Server, folder: Path, experiment: str) -> None:
    """Write what a run leaves behind that never met its server."""
    with closing(Journal(folder)) as journal:
        run = new_provisional_id()
        journal.set_owner(run, server.uri)
        points = [MetricPoints({"a": float(step)}, step, 1000 + step) for step in range(1, 21)]
        create = new_run(experiment=experiment, name=f"offline {experiment}", tags={})
        text = TextArtifact("notes/hello.txt", "hello")
        for message in (create, Params({"lr": "0.1"}), *points, text, Finish("FINISHED", 20, 2000)):
            journal.append(run, message.kind, to_body(message))


@pytest.mark.parametrize("mode", CHOSEN)
def test_every_command_ends_with_a_result_or_one_line(
    mode: str, server: Server, two_runs: tuple[str, str], tmp_path: Path
) -> None:
    first, second = two_runs
    experiment = f"{mode} sync"
    write_journal(server, tmp_path / "m", experiment)
    commands: list[tuple[object, ...]] = [
        ("runs", "--experiment", "two"),
        ("compare", first, second),
        ("eval", first),
        ("checkpoints", "ls", first),
        ("sync", tmp_path / "m", "--tracking-uri"),
    ]

    def command(words: tuple[object, ...], uri: str) -> tuple[int, str, str]:
        words = (*words, uri) if words[0] == "sync" else words
        return end(shufflenet(tmp_path / str(words[0]), uri, *words, "--json"))

    with proxy_of(server, mode) as proxy:
        with ThreadPoolExecutor(len(commands)) as pool:
            results = list(pool.map(partial(command, uri=proxy.uri), commands))
        assert proxy.modes[mode] > 0
        for words, (status, out, _) in zip(commands, results, strict=True):
            document = json.loads(out)
            assert ("error" in document) == (status == 1), words
        assert [status for status, *_ in results] == [0 if mode == "slow" else 1] * len(commands)
        proxy.mode = "pass"
        words = ("sync", tmp_path / "m", "--tracking-uri", proxy.uri, "--json")
        assert finish(shufflenet(tmp_path / "again", proxy.uri, *words))["pending"] == 0
    client, run = MlflowClient(server.uri), only_run(server, experiment)
    assert steps(client, run.info.run_id, "a") == list(range(1, 21))
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "notes")] == ["notes/hello.txt"]
    assert client.get_run(first).info.status == client.get_run(second).info.status == "FINISHED"


@pytest.mark.parametrize("mode", CHOSEN)
def test_an_evaluation_whose_results_do_not_arrive(
    mode: str, server: Server, two_runs: tuple[str, str], tmp_path: Path
) -> None:
    """Reading works and writing fails: the exit status says so, and no run is left that seems to be at work."""
    first, _ = two_runs
    experiment = f"{mode} eval"

    def choose(method: str, path: str) -> str:
        writes = method != "GET" and not path.endswith(("/search", "/search-versions"))
        return mode if writes else "pass"

    with proxy_of(server) as proxy:
        proxy.choose = choose
        words: tuple[Any, ...] = ("eval", first, "--log-to", "new", "--experiment", experiment, "--json")
        status, _, err = end(shufflenet(tmp_path / "work", proxy.uri, *words))
        time.sleep(2 * REQUEST_SECONDS if mode == "late" else 0.0)
    runs = all_runs(server, experiment)
    assert not [run for run in runs if run.info.status == "RUNNING"]
    complete = [run for run in runs if run.info.status == "FINISHED"]
    assert (status == 0) == bool(complete), err
    assert all("top1" in str(run.data.metrics) for run in complete)
