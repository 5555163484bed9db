"""Guarantee 3: a run killed at any moment and resumed elsewhere by its ID equals one that was not disturbed.

The real command in its own processes, against a real server, with real SIGKILLs.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from tests.support.command_line import small_options
from tests.support.effort import cases, repetitions
from tests.support.metrics import history
from tests.support.mlflow_server import Server
from tests.support.option_groups import GROUPS
from tests.support.payloads import assert_equal_payloads
from tests.support.processes import finish, kill, start, wait_for_iteration

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ITERATIONS = 40
EPOCH = 4
"""Iterations: the small set has 36 images, a batch 8."""

CHAINS = repetitions(full=5, ci=1)
KILLS = 4
"""In each chain; 20 in all in the full run."""


@pytest.fixture(autouse=True)
def at_the_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)


def options(images: Path, group: tuple[object, ...] = ("--ema-decay", 0.9)) -> list[object]:
    return [
        *(*small_options(images), "--total-iters", ITERATIONS, "--val-interval", 8, "--save-interval", 5),
        *("--display-interval", 1, *group),
    ]


def train_undisturbed(server: Server, folder: Path, words: list[object]) -> Any:
    """Return the last checkpoint and every metric point of an undisturbed run."""
    whole = finish(start(folder, "train", *words, "--tracking-uri", server.uri, "--json"))
    return read_checkpoint(folder / whole["checkpoint"]), history(MlflowClient(server.uri), whole["run_id"])


@pytest.fixture(scope="module")
def undisturbed(server: Server, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Share one between all chains with the same options."""
    return train_undisturbed(server, tmp_path_factory.mktemp("undisturbed"), options(images))


def compare(server: Server, run_id: str, path: Path, undisturbed: Any) -> None:
    """Compare every tensor (weights, momentum, statistics, moving average) and every metric point exactly."""
    expected, points = undisturbed
    payload = read_checkpoint(path)
    changing = ("run_id", "created_at", "config")  # the last holds the workers
    assert_equal_payloads(
        {key: value for key, value in payload.items() if key not in changing},
        {key: value for key, value in expected.items() if key not in changing},
    )
    assert history(MlflowClient(server.uri), run_id) == points


def run_of(server: Server, name: str) -> str:
    client = MlflowClient(server.uri)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        experiments = [item.experiment_id for item in client.search_experiments()]
        runs = client.search_runs(experiments, f"attributes.run_name = '{name}'")
        assert len(runs) <= 1
        if runs:
            return str(runs[0].info.run_id)
        time.sleep(0.1)
    raise AssertionError(f"no run is called {name}")


def kill_points(chain: int | str) -> list[int]:
    """Return random iterations in order: one ends an epoch, and the first chain has one before any checkpoint."""
    dice = random.Random(chain)
    points = [*dice.sample(range(5, ITERATIONS), KILLS - 1), EPOCH * dice.randrange(2, ITERATIONS // EPOCH)]
    if chain == 0:
        points[0] = 2
    return sorted(points)


@pytest.mark.parametrize("chain", range(CHAINS))
def test_a_run_killed_repeatedly_resumes_elsewhere(
    chain: int, server: Server, images: Path, tmp_path: Path, undisturbed: Any
) -> None:
    kill_and_resume(chain, server, options(images), tmp_path, undisturbed)


@pytest.mark.parametrize("group", cases(list(GROUPS), ci=1))
def test_every_group_of_options_resumes_elsewhere(group: str, server: Server, images: Path, tmp_path: Path) -> None:
    words = options(images, GROUPS[group])
    kill_and_resume(group, server, words, tmp_path, train_undisturbed(server, tmp_path / "undisturbed", words))


def kill_and_resume(chain: int | str, server: Server, words: list[object], tmp_path: Path, undisturbed: Any) -> None:
    """Train with these options, killed at the chain's moments, and compare the end with the undisturbed one."""
    dice = random.Random(f"moments {chain}")
    name = f"chain {chain}"
    words = [*words, "--run-name", name]
    run_id = ""
    for number, iteration in enumerate(kill_points(chain)):
        process = start(tmp_path / f"machine-{number}", "train", *words)
        wait_for_iteration(process, iteration)
        time.sleep(dice.uniform(0, 0.05))  # an iteration takes about so long
        run_id = run_id or run_of(server, name)
        kill(process)
        words = ["--resume", run_id, "--workers", number % 3]
    last = tmp_path / "last"
    ended = finish(start(last, "train", *words, "--json"))
    assert (ended["run_id"], ended["iters"]) == (run_id, ITERATIONS)
    assert MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"
    compare(server, run_id, last / ended["checkpoint"], undisturbed)


def test_the_comparison_notices_one_flipped_sign(
    server: Server, images: Path, tmp_path: Path, undisturbed: Any
) -> None:
    """Negative control: one momentum buffer has the opposite sign."""
    expected, points = undisturbed
    run_id = finish(start(tmp_path / "whole", "train", *options(images), "--json"))["run_id"]
    path = next((tmp_path / "whole").glob("models/*/bnps-*.pth.tar"))
    compare(server, run_id, path, undisturbed)
    expected = {**expected, "optimizer_state_dict": read_checkpoint(path)["optimizer_state_dict"]}
    expected["optimizer_state_dict"]["state"][0]["momentum_buffer"].neg_()
    with pytest.raises(AssertionError, match="momentum_buffer"):
        compare(server, run_id, path, (expected, points))
