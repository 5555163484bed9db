"""Supernets and searches that are killed at random, also within a re-estimation of BN statistics."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from torch import Tensor

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.models.search_space import SUPERNET, SUPERNETS
from shufflenet_mlflow.training import loop
from shufflenet_mlflow.workflows.searching import scoring
from shufflenet_mlflow.workflows.searching.request import SearchRequest
from tests.support.effort import cases, only_in_full_run, repetitions
from tests.support.forked import Child, Report, fork
from tests.support.payloads import assert_equal_payloads
from tests.support.searches import killed_after, search, search_in_child, search_request
from tests.support.studies import kill_all
from tests.support.training import run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

LIST = "candidates.jsonl"
KILLS = repetitions(full=5, ci=2)
ITERATIONS = repetitions(full=60, ci=24)
OPTIONS = ("--total-iters", ITERATIONS, "--val-interval", 12, "--save-interval", 8)
TEN_BY_FIVE = {"population": 10, "generations": 4, "top": 3, "bn_images": 24}
TEN_BY_FIVE_FRONT = {**TEN_BY_FIVE, "pareto": True, "top": None}


def killing_within_reestimation(after: int) -> Callable[..., Iterator[Tensor]]:
    """Return what takes the place of the images of a re-estimation: it kills its process in the middle of one."""
    count = 0

    def wrap(inputs: Iterator[Tensor]) -> Iterator[Tensor]:
        nonlocal count
        for number, images in enumerate(inputs):
            count += number == 1
            if count == after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield images

    return wrap


def dying(module: Any, after: int, work: Callable[[], object]) -> Child:
    """Do work in a child that is killed within a re-estimation of BN statistics."""
    wrap, reestimate = killing_within_reestimation(after), module.reestimate_bn

    def child(_report: Report) -> None:
        module.reestimate_bn = lambda models, inputs, *more: reestimate(models, wrap(inputs), *more)
        work()

    return fork(child)


def expect_killed(child: Child) -> None:
    status, lines = child.wait()
    assert status == signal.SIGKILL, "\n".join(lines)


@pytest.mark.parametrize("name", SUPERNETS)
def test_a_supernet_that_is_killed(name: str, images: Path, client: MlflowClient) -> None:
    def train(folder: str) -> Any:
        return run(images, "--model", name, *OPTIONS, "--save-dir", folder)

    whole = train("whole")
    generator = random.Random(1)
    expect_killed(dying(loop, 2, lambda: train("parts")))
    for _ in range(KILLS - 1):
        child = fork(lambda _report: train("parts"))
        killer = threading.Timer(generator.uniform(1.0, 10.0), kill_all, [[child.pid]])
        killer.start()
        child.wait()
        killer.cancel()
    parts = train("parts")
    assert whole.result.iters == parts.result.iters == ITERATIONS
    expect_equal_ends(Path("whole"), Path("parts"))
    assert client.get_run(parts.run_id).info.status == "FINISHED"


def expect_equal_ends(first: Path, second: Path) -> None:
    """Compare all tensors of the last checkpoints in two folders, bit for bit."""
    ends = [read_checkpoint(list_checkpoints(folder)[0]) for folder in (first, second)]
    for name in ("state_dict", "optimizer_state_dict", "metrics", "best"):
        assert_equal_payloads({name: ends[0][name]}, {name: ends[1][name]})


def request_of(
    supernet: Path, folder: Path, workers: int = 1, options: dict[str, Any] = TEN_BY_FIVE, **more: Any
) -> SearchRequest:
    return search_request(supernet, folder, workers=workers, options=options, **more)


@only_in_full_run
@pytest.mark.timeout(3000)
def test_a_supernet_of_200_iterations_and_a_search_on_it_that_are_killed_five_times(
    images: Path, client: MlflowClient, tmp_path: Path
) -> None:
    """Each is killed within a re-estimation of BN statistics, then four times at a random moment."""
    options = ("--model", SUPERNET, "--total-iters", 200, "--val-interval", 25, "--save-interval", 20)

    def train(folder: str) -> Any:
        return run(images, *options, "--save-dir", tmp_path / folder)

    generator, began = random.Random(2), time.monotonic()
    train("whole")
    seconds = time.monotonic() - began
    expect_killed(dying(loop, 2, lambda: train("parts")))
    for _ in range(4):
        child = fork(lambda _report: train("parts"))
        killer = threading.Timer(generator.uniform(0.03, 0.15) * seconds, kill_all, [[child.pid]])
        killer.start()
        expect_killed(child)
    parts = train("parts")
    assert parts.result.iters == 200
    expect_equal_ends(tmp_path / "whole", tmp_path / "parts")
    whole, request = (request_of(parts.result.checkpoint, tmp_path / f"search-{name}") for name in ("whole", "parts"))
    began = time.monotonic()
    search(whole)
    seconds = time.monotonic() - began
    expect_killed(dying(scoring, 4, lambda: search(request)))
    for _ in range(4):
        assert killed_after(request, generator.uniform(0.03, 0.15) * seconds) is None
    assert json.loads(search_in_child(request).expect_success()[-1])["is_complete"]
    lists = [(one.folder("") / LIST).read_bytes() for one in (whole, request)]
    assert lists[0].count(b"\n") == 50
    assert lists[0] == lists[1]


@pytest.fixture(scope="module")
def undisturbed(supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> bytes:
    """Return the list of candidates and scores of a search that nothing has disturbed."""
    return (undisturbed_search(supernet, tmp_path_factory, empty_database, TEN_BY_FIVE) / LIST).read_bytes()


@pytest.fixture(scope="module")
def undisturbed_front(supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Return the folder of a search for a front that nothing has disturbed."""
    return undisturbed_search(supernet, tmp_path_factory, empty_database, TEN_BY_FIVE_FRONT)


def undisturbed_search(
    supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, options: dict[str, Any]
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(empty_database, folder / "mlflow.db")
    request = request_of(supernet, folder / "s", options=options, tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert len(search(request).report.candidates) == 50
    return folder / "s"


@pytest.mark.parametrize("workers", cases([1, 2], ci=1))
def test_a_search_that_is_killed(
    workers: int, undisturbed: bytes, supernet: Path, tmp_path: Path, client: MlflowClient
) -> None:
    document = killed_search(request_of(supernet, tmp_path, workers))
    assert document["is_complete"]
    assert (tmp_path / LIST).read_bytes() == undisturbed
    expect_finished(client, 11)


@pytest.mark.parametrize("workers", cases([2, 1], ci=1))
def test_a_search_for_a_front_that_is_killed(
    workers: int, undisturbed_front: Path, supernet: Path, tmp_path: Path, client: MlflowClient
) -> None:
    document = killed_search(request_of(supernet, tmp_path, workers, TEN_BY_FIVE_FRONT))
    assert document["is_complete"]
    for name in (LIST, "pareto.json", "architecture.json"):
        assert (tmp_path / name).read_bytes() == (undisturbed_front / name).read_bytes()
    expect_finished(client, 1 + len(document["front"]))
    assert None not in {one["run_id"] for one in document["front"]}


def killed_search(request: SearchRequest) -> Any:
    """Search, killed at random moments; with one worker also within a re-estimation. Return the document of its end."""
    generator = random.Random(request.workers)
    if request.workers == 1:
        expect_killed(dying(scoring, 4, lambda: search(request)))
        assert len((request.folder("") / LIST).read_text().splitlines()) == 3
    lines = None
    for _ in range(KILLS):
        lines = lines or killed_after(request, generator.uniform(2.0, 15.0))
    if lines is None:
        lines = search_in_child(request).expect_success()
    return json.loads(lines[-1])


def expect_finished(client: MlflowClient, count: int) -> None:
    """Expect so many runs in the store, all of them finished, all but one below that one."""
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert len(runs) == count
    assert {one.info.status for one in runs} == {"FINISHED"}
    [parent] = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    assert {one.data.tags.get("mlflow.parentRunId") for one in runs} == {None, parent.info.run_id}


@pytest.mark.parametrize("workers", cases([1, 2], ci=1))
def test_comparisons_with_trained_networks_that_are_killed(workers: int, supernet: Path, tmp_path: Path) -> None:
    """With one worker, a kill costs at most the training that is at work."""
    few = {"population": 1, "generations": 0, "top": 1}
    requests = [
        search_request(supernet, tmp_path / name, workers=workers, options=few, trust=8, trust_epochs=2)
        for name in ("whole", "parts")
    ]
    search(requests[0])
    generator = random.Random(workers)
    before, path = 0, tmp_path / "parts" / "trust.jsonl"
    for _ in range(KILLS):
        if killed_after(requests[1], generator.uniform(4.0, 12.0)) is not None:
            break
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        assert lines >= before
        before = lines
    ends = [search_in_child(request).expect_success()[-1] for request in requests]
    trusts = [json.loads(end)["trust"] for end in ends]
    assert trusts[0] == trusts[1]
    assert len(trusts[0]["networks"]) == 8
    assert path.read_bytes() == (tmp_path / "whole" / "trust.jsonl").read_bytes()
