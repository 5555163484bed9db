"""Searches for branches and widths: candidates, and small searches from begin to end."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config.search import SearchPlan
from shufflenet_mlflow.errors import SearchError
from shufflenet_mlflow.models.paths import MacsTable, macs_table
from shufflenet_mlflow.models.search_space import CHANNEL_SUPERNET, SUPERNET, UNITS, WIDTHS, genes_in
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows import search as workflow
from shufflenet_mlflow.workflows.search import SearchSummary
from shufflenet_mlflow.workflows.searching import latency
from shufflenet_mlflow.workflows.searching.evolution import Scored, propose, ranked
from shufflenet_mlflow.workflows.searching.latency import LatencyTable, Measured, Timer, kept_table
from shufflenet_mlflow.workflows.searching.record import Record
from shufflenet_mlflow.workflows.searching.request import best_folder
from shufflenet_mlflow.workflows.searching.scoring import Scorer
from shufflenet_mlflow.workflows.searching.trust import Compared, TrustRecord, random_networks
from tests.support.command_line import Invoke, small_options
from tests.support.forked import fork
from tests.support.searches import listed, plan, search, search_in_child, search_in_own_store, search_request
from tests.support.training import Reporter, run

TABLE = macs_table(widths=True)


def evolve(of: SearchPlan, table: MacsTable = TABLE) -> list[Scored]:
    """Return all candidates; a stub of a score: how many units have a 7x7 kernel, and how many the width of 0.6."""
    scored: list[Scored] = []
    for generation in range(of.generations + 1):
        for one in propose(of, table, generation, scored[:]):
            correct = one.choices.count(2) + one.genes[UNITS:].count(2)
            scored.append(Scored(**vars(one), correct=correct, images=40))
    return scored


# ---------------------------------------------------------------- candidates


def test_candidates_have_widths() -> None:
    of = plan(population=30, generations=10)
    scored = evolve(of)
    assert len({one.genes for one in scored}) == len(scored) == 330
    assert all(len(one.genes) == 40 and max(one.choices) < 4 and max(one.genes) < 10 for one in scored)
    assert all(one.macs == TABLE.macs(one.genes) <= 330_000_000 for one in scored)
    assert {gene for one in scored for gene in one.genes[UNITS:]} == set(range(len(WIDTHS)))
    best, first = ranked(scored)[0], [one for one in scored if one.generation == 0]
    for part in (slice(UNITS), slice(UNITS, None)):
        assert best.genes[part].count(2) > np.mean([one.genes[part].count(2) for one in first]) + 2
    assert evolve(of) == scored
    assert evolve(replace(of, seed=1)) != scored


def test_both_kinds_of_genes_are_mutated_and_crossed() -> None:
    of = plan(population=200, mutations=100, crossovers=100, top=2, generations=1, macs_limit=10**9)
    first = [replace(one, correct=0) for one in evolve(replace(of, generations=0, population=4))]
    parents = [replace(one, correct=5) for one in first[:2]]
    second = np.array([one.genes for one in propose(of, TABLE, 1, [*parents, *first[2:]])])
    assert len(second) == 200
    of_parents = np.array([one.genes for one in parents])
    changed = second[:100, None] != of_parents
    nearest = changed[np.arange(100), changed.sum(2).argmin(1)]
    assert nearest[:, :UNITS].mean() == pytest.approx(0.1 * 3 / 4, abs=0.02)
    assert nearest[:, UNITS:].mean() == pytest.approx(0.1 * 9 / 10, abs=0.02)
    crossed, differ = second[100:], of_parents[0] != of_parents[1]
    assert ((crossed == of_parents[0]) | (crossed == of_parents[1])).all()
    of_first = crossed == of_parents[0]
    assert of_first[:, differ].mean() == pytest.approx(0.5, abs=0.05)
    apart = of_first[:, :UNITS] != of_first[:, UNITS:]  # a unit's branch and width come from different parents
    assert apart[:, differ[:UNITS] & differ[UNITS:]].mean() == pytest.approx(0.5, abs=0.1)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    scored = evolve(plan(population=3, generations=0))
    record = Record(tmp_path, plan(population=3))
    for one in scored:
        record.append(one)
    assert Record(tmp_path, plan(population=3)).scored == scored
    path = tmp_path / "candidates.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    assert [*line] == ["generation", "index", "choices", "scales", "macs", "correct", "images", "score"]
    assert [float(scale) for scale in line["scales"].split(",")] == [WIDTHS[gene] for gene in scored[0].genes[UNITS:]]
    with pytest.raises(SearchError, match="has another candidate in line 1"):
        Record(tmp_path, plan(population=3)).matches(0, replace(scored[0], genes=scored[0].choices))
    for damaged in (line["scales"].replace("0.6", "0.5"), line["scales"] + ",1.0"):
        path.write_text(json.dumps({**line, "scales": damaged}) + "\n")
        with pytest.raises(SearchError, match="candidates.jsonl' is damaged"):
            Record(tmp_path, plan(population=3))


# ---------------------------------------------------------------- small searches


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Make runs of the best two candidates only, and measure a few rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "SHOWN", 2)
        patch.setattr(latency, "ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def undisturbed(
    channel_supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> tuple[SearchSummary, Path]:
    """Return a search that nothing has disturbed, and its folder, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return search_in_own_store(search_request, channel_supernet, folder, empty_database), folder


def test_a_small_search(undisturbed: tuple[SearchSummary, Path]) -> None:
    summary, folder = undisturbed
    document, best = summary.to_dict(), summary.report.top(1)[0]
    assert (document["is_complete"], len(document["candidates"])) == (True, 9)
    assert document["best"] == {**best.options, "macs": best.macs, "score": best.score}
    assert all([*one] == ["choices", "scales", "macs", "score", "generation"] for one in document["candidates"])
    architecture = json.loads((folder / "search" / "architecture.json").read_text())
    assert genes_in(architecture) == best.genes
    options = f"--choices {best.options['choices']} --scales {best.options['scales']}"
    assert architecture["command"] == f"shufflenet train --model shufflenet_oneshot {options}"
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    children = client.search_runs(["1"], "tags.search LIKE 'rank%'")
    assert sorted(one.data.params["scales"] for one in children) == sorted(
        one.options["scales"] for one in summary.report.top(2)
    )
    assert genes_in(json.loads(client.get_run(summary.run_id or "").data.tags["search.best"])) == best.genes
    assert "figures/widths.svg" in [one.path for one in client.list_artifacts(summary.run_id or "", "figures")]
    figure = (folder / "search" / "widths.svg").read_text()
    assert all(f">{scale}<" in figure for scale in WIDTHS)


def test_scores_are_those_of_the_supernet_on_the_path(
    undisturbed: tuple[SearchSummary, Path], channel_supernet: Path, tmp_path: Path
) -> None:
    """The supernet with the path, and BN statistics re-estimated in place, gives the logits of what is scored."""
    from shufflenet_mlflow.training.batchnorm import reestimate_bn

    best = undisturbed[0].report.top(1)[0]
    payload = read_checkpoint(channel_supernet)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    torch.save({"bn": [images], "shift": [], "scoring": [images], "labels": [torch.zeros(8)]}, tmp_path / "pixels")
    supernet = workflow.model_from_payload(payload, "x")
    scorer = Scorer(channel_supernet, tmp_path / "pixels", supernet.preprocess, "cpu")
    network, whole = scorer.network(best.genes), scorer._supernet
    whole.path = best.genes
    [inputs] = scorer._bn_inputs()
    assert isinstance(inputs, Tensor)
    whole.to(memory_format=torch.channels_last)
    reestimate_bn([whole], [inputs])
    assert torch.equal(network(inputs), whole.eval()(inputs))


def test_the_same_command_again_does_nothing(undisturbed: tuple[SearchSummary, Path], channel_supernet: Path) -> None:
    summary, folder = undisturbed
    request = search_request(channel_supernet, folder / "search", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    reporter = Reporter(lambda phase, _: pytest.fail(f"it does {phase}"))
    assert search(request, reporter=reporter).to_dict() == summary.to_dict()


def test_a_stopped_search_goes_on(
    undisturbed: tuple[SearchSummary, Path], channel_supernet: Path, tmp_path: Path
) -> None:
    def interrupt(name: str, count: int) -> None:
        if (name, count) == ("searching", 4):
            signal.raise_signal(signal.SIGTERM)

    request = search_request(channel_supernet, tmp_path, workers=2)
    with StopFlag() as stop:
        stopped = search(request, reporter=Reporter(interrupt), stop=stop)
    assert stopped.stopped_by == signal.SIGTERM
    assert 4 <= len(stopped.report.candidates) <= 6  # those that the two were at may be finished
    search(request)
    assert listed(tmp_path) == listed(undisturbed[1] / "search")


@pytest.mark.long
def test_a_killed_search_goes_on(
    undisturbed: tuple[SearchSummary, Path], channel_supernet: Path, tmp_path: Path
) -> None:
    request = search_request(channel_supernet, tmp_path)

    def die(name: str, count: int) -> None:
        if (name, count) == ("searching", 4):
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork(lambda _report: search(request, reporter=Reporter(die)))
    assert child.wait()[0] == signal.SIGKILL
    assert listed(tmp_path).count(b"\n") == 4
    document = json.loads(search_in_child(request).expect_success()[-1])
    assert document["is_complete"]
    assert listed(tmp_path) == listed(undisturbed[1] / "search")


def test_training_what_it_has_found(
    undisturbed: tuple[SearchSummary, Path], images: Path, shufflenet: Invoke, tmp_path: Path
) -> None:
    summary, folder = undisturbed
    store, best = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db"), best_folder(folder / "search", 1)
    evaluated = json.loads(shufflenet("eval", best, "--json").stdout)
    assert (evaluated["n"], evaluated["model"], evaluated["iters"]) == (15, "shufflenet_oneshot", 6)
    short = ("--total-iters", 2, *store, "--save-dir", tmp_path / "m")
    trained = run(images, "--search", str(summary.run_id)[:12], *short)
    assert run(images, "--search", best, *short).was_complete
    words = summary.report.architecture(summary.report.top(1)[0])["command"].split()[2:]
    assert run(images, *words, *short).was_complete
    assert trained.result.checkpoint is not None
    config = read_checkpoint(trained.result.checkpoint)["config"]
    assert {name: config[name] for name in ("choices", "scales")} == summary.report.top(1)[0].options
    assert read_checkpoint(next(best.glob("*.pth.tar")))["config"]["scales"] == config["scales"]


# ---------------------------------------------------------------- latency, trust, a front


def test_a_table_of_latencies(tmp_path: Path) -> None:
    context, timer = JobContext.alone(Reporter(), StopFlag()), Timer(3, 32, "cpu", widths=True)
    table = kept_table(tmp_path, timer, context)
    assert [len(unit) for unit in table.units] == [40] * UNITS
    by_width = np.array(table.units).reshape(UNITS, 4, len(WIDTHS)).mean((0, 1))
    assert by_width[-1] > by_width[0]
    assert kept_table(tmp_path, timer, context) == table
    with pytest.raises(SearchError, match="holds no latencies of this search"):
        kept_table(tmp_path, Timer(3, 32, "cpu"), context)


def test_a_table_is_of_the_widths_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs of a stub follow from branch and inner width; the sums are those of each network."""
    timer = Timer(3, 32, "cpu", widths=True)

    def medians(_: Timer, parts: list[Any], context: JobContext) -> list[int]:
        units = [sum(weight.numel() for weight in unit.parameters()) for unit, _ in parts[1:-1]]
        return [0, *units, 0]

    monkeypatch.setattr(Timer, "_medians", medians)
    table = timer.table(JobContext.alone(Reporter(), StopFlag()))
    for one in evolve(plan(population=3, generations=0)):
        features = timer.network(one.genes).features
        assert table.of(one.genes) == sum(weight.numel() for weight in features.parameters())


def test_a_search_within_a_limit_of_latency(channel_supernet: Path, tmp_path: Path) -> None:
    unit = tuple(10_000 * (width + 1) for _ in range(4) for width in range(len(WIDTHS)))
    table = LatencyTable(0, (unit,) * UNITS)
    (tmp_path / "s").mkdir()
    content = {"format": 1, **Timer(3, 32, "cpu").conditions, "rest": table.rest, "units": table.units}
    (tmp_path / "s" / "latency.json").write_text(json.dumps(content))
    options = {"latency_limit": 1.0, "population": 2, "generations": 1}
    summary = search(search_request(channel_supernet, tmp_path / "s", options=options))
    document = summary.to_dict()
    for one in summary.report.candidates:
        assert table.ms(one.genes) == pytest.approx(0.01 * sum(gene + 1 for gene in one.genes[UNITS:]))
        assert table.ms(one.genes) <= 1.0
    assert [genes_in(one) for one in document["latency"]["networks"]] == [one.genes for one in summary.report.top(2)]
    assert Measured.read(tmp_path / "s") == summary.report.measured


def test_random_networks_have_widths(tmp_path: Path) -> None:
    networks = random_networks(plan(), TABLE, 6)
    assert len({one.genes for one in networks}) == 6
    assert all(len(one.genes) == 40 and one.macs <= 330_000_000 for one in networks)
    record = TrustRecord(tmp_path)
    record.append(Compared(0, 1, networks[0].genes, networks[0].macs, 3, 4, 10))
    line = json.loads((tmp_path / "trust.jsonl").read_text())
    assert [*line] == ["index", "epochs", "choices", "scales", "macs", "inherited", "trained", "images"]
    assert TrustRecord(tmp_path).compared == record.compared


@pytest.mark.long
def test_inherited_scores_beside_those_of_trained_networks(channel_supernet: Path, tmp_path: Path) -> None:
    options = {"population": 1, "generations": 0, "top": 1}
    request = search_request(channel_supernet, tmp_path / "s", options=options, trust=4, trust_epochs=1)
    networks = search(request).to_dict()["trust"]["networks"]
    assert len({one["scales"] for one in networks}) == 4
    assert all(0 <= one["trained"] <= 1 for one in networks)


def test_a_front_has_widths(channel_supernet: Path, tmp_path: Path) -> None:
    pytest.importorskip("pymoo")
    options = {"pareto": True, "top": None, "population": 4, "generations": 1}
    document = search(search_request(channel_supernet, tmp_path / "s", options=options)).to_dict()
    written = json.loads((tmp_path / "s" / "pareto.json").read_text())
    for one, entry in zip(document["front"], written["front"], strict=True):
        assert one["scales"] == entry["scales"]
        assert entry["command"].endswith(f"--scales {one['scales']}")
        assert json.loads((Path(one["folder"]) / "architecture.json").read_text())["scales"] == one["scales"]


# ---------------------------------------------------------------- the command line


def test_the_flag_of_train_and_the_table_of_search(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    words = ("--total-iters", 2, "--save-dir", tmp_path / "m", "--json")
    flagged = shufflenet("train", *small_options(images), "--model", SUPERNET, "--channel-search", *words)
    trained = json.loads(flagged.stdout)
    payload = read_checkpoint(trained["checkpoint"])
    assert payload["model"] == {"name": CHANNEL_SUPERNET, "kwargs": {"num_classes": 3}}
    assert payload["config"]["model"] == CHANNEL_SUPERNET
    again = shufflenet("train", *small_options(images), "--model", CHANNEL_SUPERNET, *words)
    assert json.loads(again.stdout)["run_id"] == trained["run_id"]
    refused = shufflenet("train", *small_options(images), "--model", SUPERNET, *words)
    assert f"changed --model ({CHANNEL_SUPERNET} -> {SUPERNET})" in refused.stderr
    small = ("--population", 2, "--generations", 0, "--bn-images", 16, "--workers", 1, "--save-dir", tmp_path / "s")
    found = shufflenet("search", trained["run_id"], *small)
    assert found.exit_code == 0
    [titles, first, *_] = found.stdout.splitlines()
    assert titles.split() == ["rank", "score", "MACs,", "M", "generation", "choices", "scales"]
    best = json.loads((tmp_path / "s" / "architecture.json").read_text())
    assert first.split()[-2:] == [best["choices"], best["scales"]]
