"""Searches for a front of accuracy and cost: the order of NSGA-II, the candidates, and small searches."""

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.config.search import SearchPlan, completed
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.models.paths import macs_table
from shufflenet_mlflow.models.search_space import UNITS
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import delivery
from shufflenet_mlflow.workflows.search import SearchSummary
from shufflenet_mlflow.workflows.searching import evolution, pareto
from shufflenet_mlflow.workflows.searching.evolution import Scored, front, parents, point, propose
from shufflenet_mlflow.workflows.searching.latency import LatencyTable, Timer
from shufflenet_mlflow.workflows.searching.pareto import Point, best_first
from shufflenet_mlflow.workflows.searching.report import SearchReport
from shufflenet_mlflow.workflows.searching.request import SearchRequest
from shufflenet_mlflow.workflows.sync import run_sync_of_all
from tests.support.command_line import Invoke
from tests.support.mlflow_server import Server
from tests.support.network import free_port
from tests.support.searches import listed, plan, search, search_in_own_store, search_request
from tests.support.training import Reporter, run

pytest.importorskip("pymoo")

TABLE = macs_table()
LIMIT = 400_000_000


def dominates(first: Point, second: Point) -> bool:
    return first != second and all(one <= other for one, other in zip(first, second, strict=True))


def points(count: int, seed: int) -> list[Point]:
    """Return points of which several are equal."""
    generator = random.Random(seed)
    return [(generator.randrange(12), generator.randrange(12)) for _ in range(count)]


# ---------------------------------------------------------------- points


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_not_dominated(seed: int) -> None:
    some = points(60, seed)
    found = pareto.front(some)
    assert [some[number] for number in found] == sorted({some[number] for number in found}, key=lambda one: one[1])
    expected = {one for one in some if not any(dominates(other, one) for other in some)}
    assert {some[number] for number in found} == expected
    assert all(number == some.index(some[number]) for number in found)
    assert {some[number] for number in found} == {some[number] for number in pareto.pymoo().sort(np.array(some))[0]}


@pytest.mark.parametrize("seed", range(5))
def test_points_come_front_by_front_and_the_ends_of_each_first(seed: int) -> None:
    some = points(60, seed)
    order = best_first(some)
    assert sorted(order) == list(range(60))
    left = set(range(60))
    while left:
        of_front = {one for one in left if not any(dominates(some[other], some[one]) for other in left)}
        numbers = [order.pop(0) for _ in of_front]
        assert set(numbers) == of_front
        costs = {some[number][1] for number in of_front}
        first_two = {some[number][1] for number in numbers[:2]}
        assert len(of_front) < 3 or len(costs) < 2 or first_two == {min(costs), max(costs)}
        left -= of_front


def test_lonely_points_come_first_and_equal_ones_in_their_order() -> None:
    assert best_first([(0, 10), (1, 9), (2, 8), (5, 5), (10, 0)])[:3] == [0, 4, 3]
    assert best_first([(3, 3)] * 4) == [0, 1, 2, 3]
    assert best_first([]) == []
    assert pareto.front([]) == []


# ---------------------------------------------------------------- candidates


def evolve(of: SearchPlan) -> list[Scored]:
    """Return all candidates; a stub of a score, which is higher for larger networks and for some branches."""
    worth_UB = np.random.default_rng(0).normal(0, 150, (UNITS, 4))
    scored: list[Scored] = []
    for generation in range(of.generations + 1):
        for candidate in propose(of, TABLE, generation, scored[:]):
            worth = sum(worth_UB[unit, branch] for unit, branch in enumerate(candidate.choices))
            correct = 5000 + worth + (candidate.macs - 3e8) * 3.5e-5
            scored.append(Scored(**vars(candidate), correct=int(np.clip(correct, 0, 10_000)), images=10_000))
    return scored


def area(scored: list[Scored]) -> float:
    """Return the area below the front, as a share of accuracy 1 up to the limit."""
    ends = [*(one.macs for one in front(scored, None)[1:]), LIMIT]
    return sum(one.score * (end - one.macs) for one, end in zip(front(scored, None), ends, strict=True)) / LIMIT


def test_nsga2_finds_a_better_front_than_evolution_and_chance() -> None:
    common: dict[str, Any] = {"macs_limit": LIMIT, "population": 30, "generations": 10}
    scored = evolve(plan(**common, pareto=True))
    assert len({candidate.choices for candidate in scored}) == len(scored) == 330
    assert all(candidate.macs == TABLE.macs(candidate.choices) <= LIMIT for candidate in scored)
    found = front(scored, None)
    assert not any(dominates(point(one, None), point(other, None)) for one in scored for other in found)
    for other in (evolve(plan(**common)), evolve(plan(**common, mutations=0, crossovers=0))):
        assert area(scored) > area(other) + 0.01


def test_candidates_follow_from_seed_generation_and_place() -> None:
    small = plan(population=8, generations=3, pareto=True)
    scored = evolve(small)
    assert evolve(small) == scored
    assert evolve(replace(small, seed=1)) != scored
    assert evolve(replace(small, pareto=False))[8:] != scored[8:]
    for generation in range(4):
        before = [one for one in scored if one.generation < generation]
        known = [one.choices for one in scored if one.generation == generation]
        assert [one.choices for one in propose(small, TABLE, generation, before)] == known


def test_a_draw_from_the_processs_own_generator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the tests that compare lists of candidates."""
    monkeypatch.setattr(evolution, "derive_seed", lambda *_: np.random.randint(2**31))
    with pytest.raises(AssertionError):
        test_candidates_follow_from_seed_generation_and_place()


def test_parents_are_those_that_survive_generation_after_generation() -> None:
    small = plan(population=10, generations=4, pareto=True)
    scored = evolve(small)
    population: list[Scored] = []
    for generation in range(5):
        before = [one for one in scored if one.generation <= generation]
        now = parents(small, before)
        pool = [*population, *(one for one in scored if one.generation == generation)]
        assert len(now) == 10
        assert {one.place for one in now} <= {one.place for one in pool}
        left = [one for one in pool if one not in now]
        assert not any(dominates(point(one, None), point(other, None)) for one in left for other in now)
        population = now
    assert {one.place for one in front(scored, None)} >= {one.place for one in front(population, None)}


def test_the_better_of_two_parents_is_drawn() -> None:
    """So children have more in common with the better half of the parents than with the worse."""
    of = plan(population=40, mutations=0, crossovers=40, generations=1, pareto=True, macs_limit=TABLE.highest)
    first = evolve(replace(of, generations=0))
    order = [one.choices for one in parents(of, first)]
    children = [one.choices for one in evolve(of) if one.generation == 1]

    def distance(child: tuple[int, ...], some: list[tuple[int, ...]]) -> float:
        return float(np.mean([sum(np.not_equal(child, one)) for one in some]))

    better, worse = (np.mean([distance(child, some) for child in children]) for some in (order[:20], order[20:]))
    assert better < worse - 0.3


def test_a_front_in_words() -> None:
    of = plan(population=10, generations=1, pareto=True)
    report = SearchReport(of, tuple(evolve(of)), 1000, 224)
    first, last = report.front[0], report.front[-1]
    assert report.front_in_words() == (
        f"{len(report.front)} networks, from accuracy {first.score:.4f} at {first.macs / 1e6:.2f} M to accuracy "
        f"{last.score:.4f} at {last.macs / 1e6:.2f} M"
    )
    alone = replace(report, candidates=(first,))
    assert alone.front_in_words() == f"1 network, accuracy {first.score:.4f} at {first.macs / 1e6:.2f} M"
    assert replace(report, candidates=()).best is None


# ---------------------------------------------------------------- small searches


def request_of(supernet: Path, folder: Path, **more: Any) -> SearchRequest:
    options = {"pareto": True, "top": None, "population": 4, **more.pop("options", {})}
    return search_request(supernet, folder, options=options, **more)


@pytest.fixture(scope="module")
def undisturbed(
    supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> tuple[SearchSummary, Path]:
    """Return a search that nothing has disturbed, and its folder, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return search_in_own_store(request_of, supernet, folder, empty_database), folder


def test_a_small_search(undisturbed: tuple[SearchSummary, Path]) -> None:
    summary, folder = undisturbed
    document = summary.to_dict()
    candidates = [(-one["score"], one["macs"]) for one in document["candidates"]]
    assert len(candidates) == 12
    assert document["is_complete"]
    found = [(-one["score"], one["macs"]) for one in document["front"]]
    assert set(found) == {one for one in candidates if not any(dominates(other, one) for other in candidates)}  # type: ignore[arg-type]
    assert [one["place"] for one in document["front"]] == list(range(1, len(found) + 1))
    assert found == sorted(found, key=lambda one: one[1])
    assert document["best"]["choices"] == document["front"][-1]["choices"]
    written = json.loads((folder / "search" / "pareto.json").read_text())
    assert (written["cost"], written["limit"], written["candidates"]) == ("macs", document["macs_limit"], 12)
    assert [one["choices"] for one in written["front"]] == [one["choices"] for one in document["front"]]
    architecture = json.loads((folder / "search" / "architecture.json").read_text())
    assert architecture["choices"] == document["best"]["choices"]
    for one in document["front"]:
        own = json.loads((Path(one["folder"]) / "architecture.json").read_text())
        assert own["choices"] == one["choices"]


def test_the_front_in_mlflow(undisturbed: tuple[SearchSummary, Path]) -> None:
    summary, folder = undisturbed
    client, document = MlflowClient(f"sqlite:///{folder}/mlflow.db"), summary.to_dict()
    runs = {one.info.run_id: one for one in client.search_runs(["1"])}
    parent = runs.pop(str(summary.run_id))
    assert parent.data.params["search.pareto"] == "True"
    assert parent.data.params["search.top"] == parent.data.params["search.population"]
    assert "**Front:**" in parent.data.tags["mlflow.note.content"]
    assert set(runs) == {one["run_id"] for one in document["front"]}
    for one in document["front"]:
        child = runs[one["run_id"]]
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == summary.run_id
        assert child.data.tags["search"] == f"front {one['place']}"
        assert (child.data.params["choices"], child.data.metrics["search/macs"]) == (one["choices"], one["macs"])
        assert client.list_artifacts(child.info.run_id, "checkpoints")
    artifacts = {entry.path for entry in client.list_artifacts(str(summary.run_id))}
    assert artifacts == {"architecture.json", "candidates.jsonl", "figures", "pareto.json"}
    assert ">front<" in (folder / "search" / "accuracy_over_macs.svg").read_text()


def test_the_same_command_again_does_nothing(undisturbed: tuple[SearchSummary, Path], supernet: Path) -> None:
    summary, folder = undisturbed
    request = request_of(supernet, folder / "search", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    reporter = Reporter(lambda phase, _: pytest.fail(f"it does {phase}"))
    assert search(request, reporter=reporter).to_dict() == summary.to_dict()
    with pytest.raises(ConfigError, match=r"began with other options: .*--pareto \(True -> False\)"):
        search(replace(request, options={**request.options, "pareto": None}))


@pytest.mark.parametrize(
    ("phase", "done", "workers"),
    [
        ("searching", 6, 1),
        pytest.param("searching", 10, 2, marks=pytest.mark.long),
        pytest.param("reading training images", 1, 2, marks=pytest.mark.long),
    ],
)
def test_a_stopped_search_goes_on(
    phase: str,
    done: int,
    workers: int,
    undisturbed: tuple[SearchSummary, Path],
    supernet: Path,
    tmp_path: Path,
    client: MlflowClient,
) -> None:
    """The sixth of twelve candidates is in the middle of the second generation."""

    def interrupt(name: str, count: int) -> None:
        if (name, count) == (phase, done):
            signal.raise_signal(signal.SIGTERM)

    with StopFlag() as stop:
        stopped = search(request_of(supernet, tmp_path, workers=workers), reporter=Reporter(interrupt), stop=stop)
    assert stopped.stopped_by == signal.SIGTERM
    assert len(stopped.report.candidates) == (done if phase == "searching" else 0)
    assert {(one["folder"], one["run_id"]) for one in stopped.to_dict()["front"]} <= {(None, None)}
    again = search(request_of(supernet, tmp_path, workers=workers))
    whole, folder = undisturbed
    assert listed(tmp_path) == listed(folder / "search")
    for name in ("pareto.json", "architecture.json"):
        assert (tmp_path / name).read_bytes() == (folder / "search" / name).read_bytes()
    assert again.run_id == stopped.run_id
    assert len(client.search_runs(["1"])) == 1 + len(whole.report.front)


def test_a_front_of_latency(supernet: Path, tmp_path: Path, client: MlflowClient) -> None:
    """By its table, larger kernels are faster, so that the front is another than by multiply-accumulates."""
    table = LatencyTable(1_000_000, tuple((40_000, 30_000, 20_000, 90_000) for _ in range(UNITS)))
    content = {"format": 1, **Timer(3, 32, "cpu").conditions, "rest": table.rest, "units": table.units}
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "latency.json").write_text(json.dumps(content))
    summary = search(request_of(supernet, tmp_path / "s", options={"latency_limit": 1.9}))
    document = summary.to_dict()
    every = [(-one.score, table.of(one.choices)) for one in summary.report.candidates]
    assert all(cost <= 1_900_000 for _, cost in every)
    found = [(-one["score"], round(one["latency_ms"] * 1e6)) for one in document["front"]]
    assert set(found) == {one for one in every if not any(dominates(other, one) for other in every)}  # type: ignore[arg-type]
    written = json.loads((tmp_path / "s" / "pareto.json").read_text())
    assert (written["cost"], written["limit"]) == ("latency_ms", 1.9)
    assert [one["choices"] for one in document["latency"]["networks"]] == [one["choices"] for one in document["front"]]
    first = client.get_run(document["front"][0]["run_id"])
    assert first.data.metrics["search/latency_ms"] == document["front"][0]["latency_ms"]
    assert first.info.run_name.endswith(f"{document['front'][0]['latency_ms']:.3f} ms")
    assert ">front<" in (tmp_path / "s" / "accuracy_over_latency.svg").read_text()
    assert ">front<" not in (tmp_path / "s" / "accuracy_over_macs.svg").read_text()


@pytest.mark.long
def test_a_search_without_a_server(
    supernet: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 0.0)
    summary = search(request_of(supernet, tmp_path, tracking_uri=f"http://127.0.0.1:{free_port()}"))
    assert summary.report.is_complete
    front = summary.to_dict()["front"]
    assert [one["run_id"] for one in front] == [None] * len(front)
    sent = run_sync_of_all(tmp_path, dry_run=False, tracking_uri=server.uri, reporter=Reporter(), stop=StopFlag())
    assert (sent.all_sent, len(sent.all_pending)) == (summary.pending, 0)
    again = search(request_of(supernet, tmp_path, tracking_uri=server.uri))
    client = MlflowClient(server.uri)
    runs = client.search_runs([run.experiment_id for run in client.search_experiments()])
    assert {run.info.run_id for run in runs} == {again.run_id, *(one["run_id"] for one in again.to_dict()["front"])}
    assert {run.info.status for run in runs} == {"FINISHED"}


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_front_and_how_to_train_each(
    undisturbed: tuple[SearchSummary, Path], supernet: Path, images: Path, shufflenet: Invoke
) -> None:
    summary, folder = undisturbed
    store = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    plan = summary.report.plan
    words = ("--pareto", "--population", 4, "--generations", 2, "--bn-images", plan.bn_images, "--batch-size", 8)
    printed = shufflenet("search", supernet, *words, "--save-dir", folder / "search", *store).stdout
    document = json.loads(
        shufflenet("search", supernet, *words, "--save-dir", folder / "search", *store, "--json").stdout
    )
    assert document == summary.to_dict()
    table = [line.split() for line in printed.splitlines()]
    for one in document["front"]:
        [row] = [row for row in table if row[0] == str(one["place"])]
        assert row[1:4] == [f"{one['score']:.4f}", f"{one['macs'] / 1e6:.2f}", str(one["generation"])]
        assert row[4:] == [one["run_id"], one["choices"]]
    last = document["front"][-1]
    assert f"train it  shufflenet train --search {last['folder']}" in printed
    first = document["front"][0]
    for name, named, choices in (
        ("folder", first["folder"], first["choices"]),
        ("run", first["run_id"][:12], first["choices"]),
        ("whole", str(summary.run_id)[:12], last["choices"]),
    ):
        trained = run(images, "--search", named, "--total-iters", 1, *store, "--save-dir", name)
        assert trained.result.checkpoint is not None
        assert MlflowClient(store[1]).get_run(trained.run_id).data.params["choices"] == choices


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"--pareto and --top \(=3\) exclude each other"):
        completed({"pareto": True, "top": 3})
    assert completed({"pareto": True, "population": 7})["top"] == 7
    assert completed({"pareto": False, "top": 3})["top"] == 3


def test_without_pymoo(shufflenet: Invoke, supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pymoo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymoo", None)
    answer = shufflenet("search", supernet, "--pareto", "--save-dir", tmp_path / "s", "--json")
    assert answer.exit_code == 2
    assert json.loads(answer.stdout)["error"]["code"] == "pareto-package-missing"
    [line] = [line for line in answer.stderr.splitlines() if line.startswith("Error")]
    assert "--pareto needs the package pymoo" in line
    assert line.endswith("pip install 'shufflenet-mlflow[pareto]'")
    assert not (tmp_path / "s").exists()


def test_pymoo_is_imported_only_for_a_front_and_imports_little() -> None:
    code = (
        "import sys\n"
        "from shufflenet_mlflow.workflows.searching import pareto\n"
        "assert 'pymoo' not in sys.modules\n"
        "pareto.pymoo()\n"
        "print(*{'torch', 'mlflow', 'matplotlib', 'autograd', 'pymoo'} & set(sys.modules))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["pymoo"]
