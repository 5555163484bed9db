"""Searches within a limit of latency: the table, the candidates, and the best networks as wholes."""

import json
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.errors import ConfigError, SearchError
from shufflenet_mlflow.models.paths import macs_table, uniform_genes
from shufflenet_mlflow.models.search_space import UNITS
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows import search as workflow
from shufflenet_mlflow.workflows.searching import latency
from shufflenet_mlflow.workflows.searching.evolution import propose
from shufflenet_mlflow.workflows.searching.latency import LatencyTable, Measured, Timer
from shufflenet_mlflow.workflows.searching.request import SearchRequest
from tests.support.searches import killed_after, plan, search, search_in_child, search_request
from tests.support.training import Reporter


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Measure a few rounds, and make runs of the best two candidates only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "SHOWN", 2)
        patch.setattr(latency, "ROUNDS", 5)
        yield


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    """Return a table with costs of its own: the larger kernel is the faster one."""
    return LatencyTable(1_000_000, tuple((40_000, 30_000, 20_000, 90_000) for _ in range(UNITS)))


def keep(table: LatencyTable, folder: Path) -> None:
    """Keep a table in the folder of a search, as if it had been measured."""
    folder.mkdir()
    content = {"format": 1, **Timer(3, 32, "cpu").conditions, "rest": table.rest, "units": table.units}
    (folder / "latency.json").write_text(json.dumps(content))


def limited(supernet: Path, folder: Path, limit: float, **more: Any) -> SearchRequest:
    return search_request(supernet, folder, options={"latency_limit": limit}, **more)


def test_candidates_are_within_the_limit_of_latency(table: LatencyTable) -> None:
    of = plan(macs_limit=None, latency_limit=1.75, population=30, generations=0)
    candidates = propose(of, macs_table(), 0, [], table)
    assert len(candidates) == 30
    assert all(table.ms(one.choices) <= 1.75 for one in candidates)
    drawn = uniform_genes(200, torch.Generator().manual_seed(0))
    assert not all(table.ms(one) <= 1.75 for one in drawn.tolist())
    assert all(one.macs == macs_table().macs(one.choices) for one in candidates)


def test_a_search_within_a_limit_of_latency(table: LatencyTable, supernet: Path, tmp_path: Path, client: Any) -> None:
    keep(table, tmp_path / "s")
    before = (tmp_path / "s" / "latency.json").read_bytes()
    summary = search(limited(supernet, tmp_path / "s", 1.75))
    document = summary.to_dict()
    assert (document["macs_limit"], document["latency_limit"], len(document["candidates"])) == (None, 1.75, 9)
    for one in document["candidates"]:
        assert table.ms([int(number) for number in one["choices"].split(",")]) <= 1.75
    shown = document["latency"]["networks"]
    assert [one["choices"] for one in shown] == [one.listed for one in summary.report.top(2)]
    assert all(one["measured_ms"] > 0 for one in shown)
    assert document["latency"]["mean_error"] == pytest.approx(
        statistics.fmean(abs(one["predicted_ms"] / one["measured_ms"] - 1) for one in shown)
    )
    assert (tmp_path / "s" / "latency.json").read_bytes() == before
    assert search(limited(supernet, tmp_path / "s", 1.75)).to_dict() == document
    run = client.get_run(summary.run_id)
    assert run.data.metrics["search/latency_error"] == document["latency"]["mean_error"]
    assert "1.75 ms of latency" in run.data.tags["mlflow.note.content"]
    assert "latency.json" in [entry.path for entry in client.list_artifacts(summary.run_id)]
    figures = [entry.path for entry in client.list_artifacts(summary.run_id, "figures")]
    assert "figures/accuracy_over_latency.svg" in figures


def test_an_interrupted_search_goes_on_with_its_table(supernet: Path, tmp_path: Path) -> None:
    """The table is measured once; other measurements would be another table, and other candidates."""

    def interrupt(name: str, done: int) -> None:
        if (name, done) == ("searching", 4):
            signal.raise_signal(signal.SIGTERM)

    with StopFlag() as stop:
        search(limited(supernet, tmp_path / "a", 1e6), reporter=Reporter(interrupt), stop=stop)
    measured = json.loads((tmp_path / "a" / "latency.json").read_bytes())
    assert (measured["threads"], measured["unit"], measured["input_size"]) == (1, "ns", 32)
    lines = (tmp_path / "a" / "candidates.jsonl").read_bytes()
    assert len(lines.splitlines()) == 4
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "latency.json", tmp_path / "b")
    for folder in ("a", "b"):
        search(limited(supernet, tmp_path / folder, 1e6))
    assert json.loads((tmp_path / "a" / "latency.json").read_bytes()) == measured
    ends = [(tmp_path / folder / "candidates.jsonl").read_bytes() for folder in ("a", "b")]
    assert ends[0] == ends[1]
    assert ends[0].startswith(lines)


@pytest.mark.long
def test_a_search_within_a_limit_that_is_killed(supernet: Path, tmp_path: Path, client: MlflowClient) -> None:
    request = limited(supernet, tmp_path / "s", 1e6)
    for seconds in (3.0, 5.0, 7.0):
        killed_after(request, seconds)
    document = json.loads(search_in_child(request).expect_success()[-1])
    assert document["is_complete"]
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "s" / "latency.json", tmp_path / "again")
    search(limited(supernet, tmp_path / "again", 1e6))
    lines = [(tmp_path / folder / "candidates.jsonl").read_bytes() for folder in ("s", "again")]
    assert lines[0] == lines[1]


def test_a_table_is_measured_unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every branch of every unit runs as often as there are rounds, on an image of its own size."""
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(latency, "WARM_UP", 0)
    network = Timer.network

    def watched(timer: Timer, choices: tuple[int, ...]) -> Any:
        model = network(timer, choices)
        for number, unit in enumerate(model.features):
            name = f"{number}.{choices[number]}"
            unit.register_forward_hook(lambda _, images, __, name=name: ran.append((name, str(tuple(images[0].shape)))))
        return model

    monkeypatch.setattr(Timer, "network", watched)
    found = Timer(3, 64, "cpu").table(JobContext.alone(Reporter(), StopFlag()))
    assert [len(unit) for unit in found.units] == [4] * 20
    assert 0 < found.lowest <= found.highest
    sizes = {name: {size for one, size in ran if one == name} for name, _ in ran}
    assert {name: len(found) for name, found in sizes.items()} == {f"{u}.{b}": 1 for u in range(20) for b in range(4)}
    assert sizes["0.3"] == {"(1, 16, 32, 32)"}
    assert sizes["19.1"] == {"(1, 640, 2, 2)"}
    assert [one for one, _ in ran].count("7.2") == latency.ROUNDS


def test_time_that_other_processes_take_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that sleeps stands for one that is kept from running."""
    network = Timer.network

    def interrupted(timer: Timer, choices: tuple[int, ...]) -> Any:
        model = network(timer, choices)
        model.first_conv.register_forward_hook(lambda *_: time.sleep(0.1))
        return model

    monkeypatch.setattr(Timer, "network", interrupted)
    [cost] = Timer(3, 32, "cpu").whole([(0,) * UNITS], JobContext.alone(Reporter(), StopFlag()))
    assert 0 < cost < 0.1e9
    monkeypatch.setattr(Timer, "_clock", lambda _: time.perf_counter_ns)
    [cost] = Timer(3, 32, "cpu").whole([(0,) * UNITS], JobContext.alone(Reporter(), StopFlag()))
    assert cost > 0.1e9


def test_measured_latencies_beside_those_of_the_table(tmp_path: Path) -> None:
    measured = Measured((((0,) * 20, 2.0, 2.5), ((1,) * 20, 4.0, 3.2)))
    assert measured.bias == pytest.approx((1.25 + 0.8) / 2 - 1)
    assert measured.error == pytest.approx((0.2 + 0.25) / 2)
    assert Measured.read(tmp_path) is None
    measured.write(tmp_path)
    assert Measured.read(tmp_path) == measured


def test_limits_and_tables_that_cannot_be_used(table: LatencyTable, supernet: Path, tmp_path: Path) -> None:
    keep(table, tmp_path / "s")
    with pytest.raises(ConfigError, match=r"--latency-limit \(=0.5\) is below every network; networks take 1.4 to 2.8"):
        search(limited(supernet, tmp_path / "s", 0.5))
    reporter = Reporter()
    search(limited(supernet, tmp_path / "s", 5), reporter=reporter)  # the same folder: nothing had begun
    assert any("--latency-limit (=5) leaves out nothing" in note for note in reporter.notes)
    with pytest.raises(ConfigError, match=r"began with other options: --latency-limit \(5 -> 2\)"):
        search(limited(supernet, tmp_path / "s", 2))
    content = json.loads((tmp_path / "s" / "latency.json").read_text())
    for change in ({"input_size": 64}, {"format": 2}, {"units": [[1]]}, {"rest": None}):
        (tmp_path / "s" / "latency.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(SearchError, match="latency.json' holds no latencies of this search .*remove the folder"):
            search(limited(supernet, tmp_path / "s", 5))
    (tmp_path / "s" / "latency.json").write_text(json.dumps({**content, "processor": "another"}))
    search(limited(supernet, tmp_path / "s", 5), reporter=reporter)
    assert any("latencies are those of another" in note for note in reporter.notes)
