"""The search: its candidates, the record of their scores, and small searches from begin to end."""

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config.search import PUBLISHED, SearchPlan, completed
from shufflenet_mlflow.data.sampler import derive_seed
from shufflenet_mlflow.errors import BusyError, ConfigError, SearchError, UnresolvedError
from shufflenet_mlflow.models.paths import MacsTable, macs_table
from shufflenet_mlflow.models.search_space import SUPERNET
from shufflenet_mlflow.tracking import delivery
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.workflows import search as workflow
from shufflenet_mlflow.workflows.search import SearchSummary
from shufflenet_mlflow.workflows.searching import evolution, workers
from shufflenet_mlflow.workflows.searching.evolution import Scored, propose, ranked
from shufflenet_mlflow.workflows.searching.record import Record
from shufflenet_mlflow.workflows.searching.request import best_folder
from shufflenet_mlflow.workflows.searching.scoring import Scorer
from shufflenet_mlflow.workflows.sync import run_sync_of_all
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.mlflow_server import Server
from tests.support.network import free_port
from tests.support.searches import listed, plan, search, search_in_own_store, search_request
from tests.support.training import Reporter, run

TABLE = macs_table()


def evolve(of: SearchPlan, table: MacsTable = TABLE) -> list[Scored]:
    """Return all candidates; a stub of a score: how many branches are those of the released network."""
    scored: list[Scored] = []
    for generation in range(of.generations + 1):
        for candidate in propose(of, table, generation, scored[:]):
            correct = sum(np.equal(candidate.choices, (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)))
            scored.append(Scored(**vars(candidate), correct=int(correct), images=20))
    return scored


# ---------------------------------------------------------------- candidates


def test_the_published_defaults() -> None:
    published = plan()
    assert (published.population, published.generations, published.top) == (50, 20, 10)
    assert (published.mutations, published.crossovers, published.mutation_probability) == (25, 25, 0.1)
    assert published.candidates == 1050
    scored = evolve(published)
    assert len(scored) == 1050
    assert len({candidate.choices for candidate in scored}) == 1050
    assert all(candidate.macs == TABLE.macs(candidate.choices) <= 330_000_000 for candidate in scored)
    assert ranked(scored)[0].correct > max(one.correct for one in scored if one.generation == 0) + 3
    assert [one.place for one in scored] == sorted(one.place for one in scored)


def test_candidates_follow_from_seed_generation_and_place() -> None:
    small = plan(population=8, generations=3)
    scored = evolve(small)
    assert evolve(small) == scored
    assert evolve(replace(small, seed=1)) != scored
    assert propose(small, TABLE, 0, [])[3:] == propose(replace(small, population=20), TABLE, 0, [])[3:8]
    half = [one for one in scored if one.generation < 2]
    assert [one.choices for one in propose(small, TABLE, 2, half)] == [
        one.choices for one in scored if one.generation == 2
    ]


def test_a_draw_from_the_processs_own_generator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the tests that compare lists of candidates."""
    monkeypatch.setattr(evolution, "derive_seed", lambda *_: np.random.randint(2**31))
    with pytest.raises(AssertionError):
        test_candidates_follow_from_seed_generation_and_place()


def test_mutations_and_crossovers_are_what_they_are_called() -> None:
    of = plan(population=40, mutations=20, crossovers=10, top=2, generations=1)
    first = [replace(one, correct=0) for one in evolve(replace(of, generations=0))]
    parents = [replace(one, correct=5) for one in first[:2]]
    second = propose(of, TABLE, 1, [*parents, *first[2:]])
    distances = [min(sum(np.not_equal(one.choices, parent.choices)) for parent in parents) for one in second]
    assert max(distances[:20]) <= 8
    for one in second[20:30]:
        genes = zip(one.choices, parents[0].choices, parents[1].choices, strict=True)
        assert all(gene in pair for gene, *pair in genes)
    assert np.mean(distances[30:]) > 10


def test_no_more_candidates_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "RANDOM_TRIES", 5000)
    assert propose(plan(macs_limit=TABLE.lowest + 5_000_000, population=3), TABLE, 0, []) == []
    few = propose(plan(macs_limit=TABLE.lowest + 15_000_000, population=40), TABLE, 0, [])
    assert 0 < len(few) < 40
    assert all(one.macs <= TABLE.lowest + 15_000_000 for one in few)


def test_generations_of_too_many_children() -> None:
    with pytest.raises(ConfigError, match=r"--mutations \(=40\) and --crossovers \(=25\) are together more than"):
        completed({"mutations": 40})
    assert completed({"population": 9})["mutations"] == 4
    assert completed({}).items() >= PUBLISHED.items()


# ---------------------------------------------------------------- the record


def some(count: int = 3) -> list[Scored]:
    return evolve(plan(population=count, generations=0))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(tmp_path, plan(population=3))
    for scored in some():
        record.append(scored)
    assert Record(tmp_path, plan(population=3)).scored == some()


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    for scored in some():
        Record(tmp_path, plan(population=3)).append(scored)
    path = tmp_path / "candidates.jsonl"
    whole = path.read_bytes()
    for cut in (1, 10, 60):
        path.write_bytes(whole[:-cut])
        assert Record(tmp_path, plan(population=3)).scored == some()[:2]
        Record(tmp_path, plan(population=3)).append(some()[2])
        assert path.read_bytes() == whole


def test_records_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(population=3, supernet="a", bn_digest="b", score_digest="c")
    Record(tmp_path, first).append(some()[0])
    for change, message in (
        ({"macs_limit": 5}, r"began with other options: --macs-limit \(330000000 -> 5\); leave them"),
        ({"supernet": "x", "seed": 4}, "has the search of another supernet; name another folder"),
        ({"bn_digest": "x"}, "the training images are not those that the search in .* began with"),
        ({"bn_digest": "x", "score_digest": "x"}, "the training images and held-out images are not those"),
    ):
        with pytest.raises(ConfigError, match=message):
            Record(tmp_path, replace(first, **change))  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="has another candidate in line 1 than this version"):
        Record(tmp_path, first).matches(0, some()[1])
    with (
        pytest.raises(SearchError, match="cannot write .*candidates.jsonl.*the disk is full"),
        monkeypatch.context() as m,
    ):
        m.setattr(os, "write", lambda _descriptor, line: len(line) // 2)
        Record(tmp_path, first).append(some()[1])
    (tmp_path / "candidates.jsonl").write_text("[]\n")
    with pytest.raises(SearchError, match="candidates.jsonl' is damaged .*; remove the folder"):
        Record(tmp_path, first)
    for content in ("{}", "x", '{"format": 2, "plan": {}}'):
        (tmp_path / "search.json").write_text(content)
        with pytest.raises(SearchError, match="search.json' is no plan of a search that this version reads"):
            Record(tmp_path, first)


# ---------------------------------------------------------------- small searches


@pytest.fixture(autouse=True, scope="module")
def two_runs() -> Iterator[None]:
    """Make runs of the best two candidates only: each takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "SHOWN", 2)
        yield


@pytest.fixture(scope="module")
def undisturbed(
    supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> tuple[SearchSummary, Path]:
    """Return a search that nothing has disturbed, and its folder, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return search_in_own_store(search_request, supernet, folder, empty_database), folder


def test_a_small_search(undisturbed: tuple[SearchSummary, Path], supernet: Path) -> None:
    summary, folder = undisturbed
    document = summary.to_dict()
    assert document["is_complete"]
    assert len(document["candidates"]) == 9
    assert document["pending"] == 0
    assert document["best"]["score"] == max(one["score"] for one in document["candidates"])
    [own] = [one for one in document["candidates"] if one["choices"] == document["best"]["choices"]]
    assert own == {**document["best"], "generation": own["generation"]}
    assert json.loads((folder / "search" / "architecture.json").read_text())["choices"] == document["best"]["choices"]
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs(["1"])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_id == summary.run_id
    assert parent.data.params["search.macs_limit"] == str(summary.report.plan.macs_limit)
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    for child in runs:
        if child.info.run_id == summary.run_id:
            continue
        assert child.data.tags["mlflow.parentRunId"] == summary.run_id
        own_choices = json.loads(child.data.tags["search.best"])["choices"]
        assert own_choices == child.data.params["choices"]
        assert {entry.path for entry in client.list_artifacts(child.info.run_id, "checkpoints")} >= {
            "checkpoints/checkpoint-000006.pth.tar"
        }
    artifacts = {entry.path for entry in client.list_artifacts(summary.run_id or "")}
    assert artifacts == {"architecture.json", "candidates.jsonl", "figures"}
    figures = {entry.path.rpartition("/")[2] for entry in client.list_artifacts(summary.run_id or "", "figures")}
    assert figures == {"accuracy_over_macs.svg", "generations.svg", "choices.svg"}
    assert not [path for path in (folder / "search").iterdir() if path.name.startswith(".")]


def test_the_same_command_again_does_nothing(undisturbed: tuple[SearchSummary, Path], supernet: Path) -> None:
    summary, folder = undisturbed
    request = search_request(supernet, folder / "search", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    reporter = Reporter(lambda phase, _: pytest.fail(f"it does {phase}"))
    assert search(request, reporter=reporter).to_dict() == summary.to_dict()
    with pytest.raises(ConfigError, match=r"began with other options: --seed \(0 -> 1\)"):
        search(replace(request, options={**request.options, "seed": 1}))


@pytest.mark.parametrize("count", [0, pytest.param(2, marks=pytest.mark.long)])
def test_other_numbers_of_workers_give_the_same_list(
    count: int, undisturbed: tuple[SearchSummary, Path], supernet: Path, tmp_path: Path
) -> None:
    search(search_request(supernet, tmp_path, workers=count))
    assert listed(tmp_path) == listed(undisturbed[1] / "search")


@pytest.mark.parametrize(
    ("phase", "done"),
    [
        ("searching", 1),
        pytest.param("searching", 7, marks=pytest.mark.long),
        pytest.param("reading training images", 1, marks=pytest.mark.long),
    ],
)
def test_a_stopped_search_goes_on(
    phase: str, done: int, undisturbed: tuple[SearchSummary, Path], supernet: Path, tmp_path: Path, client: MlflowClient
) -> None:
    from shufflenet_mlflow.runtime.signals import StopFlag

    def interrupt(name: str, count: int) -> None:
        if (name, count) == (phase, done):
            signal.raise_signal(signal.SIGTERM)

    with StopFlag() as stop:
        stopped = search(search_request(supernet, tmp_path), reporter=Reporter(interrupt), stop=stop)
    assert stopped.stopped_by == signal.SIGTERM
    assert len(stopped.report.candidates) == (done if phase == "searching" else 0)
    assert client.get_run(stopped.run_id or "").info.status == "KILLED"
    again = search(search_request(supernet, tmp_path))
    assert again.run_id == stopped.run_id
    assert client.get_run(again.run_id or "").info.status == "FINISHED"
    assert listed(tmp_path) == listed(undisturbed[1] / "search")
    assert len(client.search_runs(["1"])) == 3


@pytest.mark.long
def test_a_score_from_the_processs_own_generator_is_noticed(
    undisturbed: tuple[SearchSummary, Path], supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: images that depend on the process are seen in the list."""
    monkeypatch.setattr("shufflenet_mlflow.data.loader.derive_seed", lambda *_: np.random.randint(2**31))
    search(search_request(supernet, tmp_path))
    assert listed(tmp_path) != listed(undisturbed[1] / "search")


def test_the_best_is_an_ordinary_checkpoint(
    undisturbed: tuple[SearchSummary, Path], images: Path, shufflenet: Invoke, tmp_path: Path
) -> None:
    summary, folder = undisturbed
    best = best_folder(folder / "search", 1)
    evaluated = json.loads(shufflenet("eval", best, "--json").stdout)
    assert (evaluated["n"], evaluated["model"], evaluated["iters"]) == (15, "shufflenet_oneshot", 6)
    tuned = run(images, "--init-from", best, "--total-iters", 4, "--save-dir", tmp_path / "tuned")
    assert tuned.result.checkpoint is not None
    payload = read_checkpoint(tuned.result.checkpoint)
    assert payload["model"]["kwargs"]["choices"] == list(summary.report.top(1)[0].choices)
    assert shufflenet("export", best, "--format", "pt2", "--output", tmp_path / "best.pt2").exit_code == 0


def test_scores_are_of_held_out_images(supernet: Path, images: Path, tmp_path: Path) -> None:
    """The score is the accuracy that `evaluate` finds on the held-out images, which are a fifth of each class."""
    summary = search(search_request(supernet, tmp_path, options={"generations": 0, "population": 1, "top": 1}))
    [scored] = summary.report.candidates
    assert scored.images == 6
    trained_on = read_checkpoint(supernet)["data"]["train_counts"]
    assert sum(trained_on.values()) + scored.images == 36


@pytest.mark.long
def test_a_search_without_a_server(
    supernet: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "GIVE_UP_SECONDS", 0.0)
    away = f"http://127.0.0.1:{free_port()}"
    summary = search(search_request(supernet, tmp_path, tracking_uri=away))
    assert summary.report.is_complete
    assert summary.run_id is None
    assert summary.pending
    client = MlflowClient(server.uri)
    sent = run_sync_of_all(
        tmp_path, dry_run=False, tracking_uri=server.uri, reporter=Reporter(), stop=workflow.StopFlag()
    )
    assert (sent.all_sent, len(sent.all_pending)) == (summary.pending, 0)
    again = search(search_request(supernet, tmp_path, tracking_uri=server.uri))
    assert again.pending == 0
    runs = client.search_runs([run.experiment_id for run in client.search_experiments()])
    assert len(runs) == 3
    children = [run for run in runs if run.info.run_id != again.run_id]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {again.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}


# ---------------------------------------------------------------- what goes wrong


def test_two_searches_at_once(supernet: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    try:
        with pytest.raises(BusyError, match="is in use by this process"):
            search(search_request(supernet, tmp_path))
    finally:
        journal.close()


def test_limits(supernet: Path, tmp_path: Path) -> None:
    table = macs_table(3, 32)
    with pytest.raises(ConfigError, match=r"--macs-limit \(=1,000\) is below every network; networks at 32 px with 3"):
        search(search_request(supernet, tmp_path, options={"macs_limit": 1000}))
    assert not list(tmp_path.iterdir())
    with pytest.raises(SearchError, match=f"no network within --macs-limit .={table.lowest:,}. was found; raise it"):
        search(search_request(supernet, tmp_path / "a", options={"macs_limit": table.lowest, "population": 1}))
    reporter = Reporter()
    options = {"macs_limit": 330_000_000, "population": 1, "generations": 0}
    search(search_request(supernet, tmp_path / "b", options=options), reporter=reporter)
    assert any("leaves out nothing" in note for note in reporter.notes)


def test_supernets_of_no_use(images: Path, supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="has other classes than"):
        write_images(tmp_path / "other", per_class=6)
        (tmp_path / "other" / "red").rename(tmp_path / "other" / "rot")
        search(search_request(supernet, tmp_path / "s", train_dir=str(tmp_path / "other")))
    payload = read_checkpoint(supernet)
    del payload["config"]
    torch.save(payload, tmp_path / "bare.pth.tar")
    with pytest.raises(ConfigError, match="does not say which images it was trained on"):
        search(search_request(tmp_path / "bare.pth.tar", tmp_path / "s"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="starts its processes itself"):
        search(search_request(supernet, tmp_path / "s"))


@pytest.mark.long
def test_images_that_lie_elsewhere(supernet: Path, images: Path, undisturbed: Any, tmp_path: Path) -> None:
    shutil.copytree(images / "train", tmp_path / "moved")
    search(search_request(supernet, tmp_path / "s", train_dir=str(tmp_path / "moved")))
    assert listed(tmp_path / "s") == listed(undisturbed[1] / "search")
    write_images(tmp_path / "more", per_class=15)
    reporter = Reporter()
    options = {"population": 1, "generations": 0}
    search(
        search_request(supernet, tmp_path / "t", train_dir=str(tmp_path / "more"), options=options), reporter=reporter
    )
    assert any("no longer holds the images that the supernet was trained on" in text for text in reporter.warnings)


def test_images_that_cannot_be_read(supernet: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "train", tmp_path / "train")
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    payload = read_checkpoint(supernet)
    payload["config"]["on_bad_image"] = "skip"
    torch.save(payload, tmp_path / "supernet.pth.tar")
    request = search_request(tmp_path / "supernet.pth.tar", tmp_path / "s", train_dir=str(tmp_path / "train"))
    with pytest.raises(SearchError, match="too few of the images in .* are readable"):
        search(request)


class Failing(Scorer):
    """Fails in another process."""

    def correct(self, choices: Sequence[int]) -> int:
        if choices[0] == 1:
            raise ConfigError("as it should", code="test")
        if choices[0] == 2:
            os._exit(3)
        raise ValueError("no project error")


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        pytest.param(0, SearchError, "scores candidates failed: ValueError: no project error", marks=pytest.mark.long),
        pytest.param(1, ConfigError, "as it should", marks=pytest.mark.long),
        (2, SearchError, r"a process that scores candidates died \(exit status 3\)"),
    ],
)
def test_workers_that_fail(first: int, error: type[Exception], message: str) -> None:
    scorer = Failing(Path(), Path(), None, "cpu")  # type: ignore[arg-type]
    candidate = replace(some(1)[0], genes=(first, *[0] * 19))
    with workers.scores_by(scorer, 2, workflow.StopFlag()) as scores, pytest.raises(error, match=message):
        list(scores.of([candidate, candidate]))


def test_no_room_for_pixels(supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shufflenet_mlflow.workflows.searching.images.torch.save", full)
    with pytest.raises(SearchError, match="cannot keep the images of the search in .*make room, or lower --bn-images"):
        search(search_request(supernet, tmp_path))


def test_seeds_of_candidates_are_their_own() -> None:
    assert derive_seed(0, evolution.SEARCH_STREAM, 0, 0) != derive_seed(0, -2, 0)
    assert SUPERNET in workflow.SUPERNET


# ---------------------------------------------------------------- training what was found


def test_training_what_a_search_has_found(
    undisturbed: tuple[SearchSummary, Path], images: Path, shufflenet: Invoke
) -> None:
    summary, folder = undisturbed
    store = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    best = summary.report.top(1)[0].listed
    short = ("--total-iters", 2, *store)
    by_run = run(images, "--search", str(summary.run_id)[:12], *short, "--save-dir", "by-run")
    for named in (folder / "search", folder / "search" / "architecture.json", best_folder(folder / "search", 1)):
        resumed = run(images, "--search", named, *short, "--save-dir", "by-run")
        assert resumed.was_complete
    config = read_checkpoint(by_run.result.checkpoint)["config"]  # type: ignore[arg-type]
    assert (config["model"], config["choices"]) == ("shufflenet_oneshot", best)


def test_searches_that_have_found_nothing(shufflenet: Invoke, workplace: Path, images: Path) -> None:
    (workplace / "empty").mkdir()
    (workplace / "x.json").write_text('{"choices": 3}')
    for word in ("empty", "x.json"):
        with pytest.raises(UnresolvedError, match=f"--search .={word}. holds no network that a search has found"):
            run(images, "--search", word)
    with pytest.raises(UnresolvedError, match="--search .=no. must be the run of a search"):
        run(images, "--search", "no")
    with pytest.raises(UnresolvedError, match="there is no run 0{32}"):
        run(images, "--search", "0" * 32)
