"""Supernets and searches that are killed at random, also within a re-estimation of BN statistics."""

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from torch import Tensor

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.models.search_space import SUPERNET
from shufflenet_mlflow.training import loop
from shufflenet_mlflow.workflows.searching import scoring
from shufflenet_mlflow.workflows.searching.request import SearchRequest
from tests.support.effort import cases, repetitions
from tests.support.forked import Child, Report, fork
from tests.support.payloads import assert_equal_payloads
from tests.support.searches import killed_after, search, search_in_child, search_request
from tests.support.studies import kill_all
from tests.support.training import run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

KILLS = repetitions(full=5, ci=2)
ITERATIONS = repetitions(full=60, ci=24)
OPTIONS = ("--model", SUPERNET, "--total-iters", ITERATIONS, "--val-interval", 12, "--save-interval", 8)
TEN_BY_FIVE = {"population": 10, "generations": 4, "top": 3, "bn_images": 24}


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


def test_a_supernet_that_is_killed(images: Path, client: MlflowClient) -> None:
    def train(folder: str) -> Any:
        return run(images, *OPTIONS, "--save-dir", folder)

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
    ends = [read_checkpoint(list_checkpoints(Path(folder))[0]) for folder in ("whole", "parts")]
    assert whole.result.iters == parts.result.iters == ITERATIONS
    for name in ("state_dict", "optimizer_state_dict", "metrics", "best"):
        assert_equal_payloads({name: ends[0][name]}, {name: ends[1][name]})
    assert client.get_run(parts.run_id).info.status == "FINISHED"


def request_of(supernet: Path, folder: Path, workers: int) -> SearchRequest:
    return search_request(supernet, folder, workers=workers, options=TEN_BY_FIVE)


@pytest.fixture(scope="module")
def undisturbed(supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> bytes:
    """Return the list of candidates and scores of a search that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(empty_database, folder / "mlflow.db")
    request = search_request(supernet, folder / "s", tracking_uri=f"sqlite:///{folder}/mlflow.db", options=TEN_BY_FIVE)
    assert len(search(request).report.candidates) == 50
    return (folder / "s" / "candidates.jsonl").read_bytes()


@pytest.mark.parametrize("workers", cases([1, 2], ci=1))
def test_a_search_that_is_killed(
    workers: int, undisturbed: bytes, supernet: Path, tmp_path: Path, client: MlflowClient
) -> None:
    request = request_of(supernet, tmp_path, workers)
    generator = random.Random(workers)
    if workers == 1:
        expect_killed(dying(scoring, 4, lambda: search(request)))
        assert len((tmp_path / "candidates.jsonl").read_text().splitlines()) == 3
    lines = None
    for _ in range(KILLS):
        lines = lines or killed_after(request, generator.uniform(2.0, 15.0))
    if lines is None:
        lines = search_in_child(request).expect_success()
    document = json.loads(lines[-1])
    assert document["is_complete"]
    assert (tmp_path / "candidates.jsonl").read_bytes() == undisturbed
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert len(runs) == 11
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
