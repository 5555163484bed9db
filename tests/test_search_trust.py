"""How far inherited scores can be trusted: random networks, trained briefly, beside what they inherit."""

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
from shufflenet_mlflow.errors import ConfigError, SearchError
from shufflenet_mlflow.models.paths import macs_table
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.workflows import search as workflow
from shufflenet_mlflow.workflows.search import SearchSummary
from shufflenet_mlflow.workflows.searching.request import SearchRequest
from shufflenet_mlflow.workflows.searching.trust import Compared, Trust, TrustRecord, random_networks
from tests.support.searches import plan, search, search_request
from tests.support.training import Reporter, run

TABLE = macs_table()


@pytest.fixture(autouse=True, scope="module")
def one_run() -> Iterator[None]:
    """Make a run of the best candidate only: each takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "SHOWN", 1)
        yield


def comparing(supernet: Path, folder: Path, **more: Any) -> SearchRequest:
    """Return the request of a search of one candidate that compares four networks."""
    options = {"population": 1, "generations": 0, "top": 1}
    return search_request(supernet, folder, options=options, **{"trust": 4, "trust_epochs": 1, **more})


@pytest.fixture(scope="module")
def trusted(
    supernet: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> tuple[SearchSummary, Path]:
    """Return a search with comparisons that nothing has disturbed, and its folder."""
    folder = tmp_path_factory.mktemp("trusted")
    shutil.copy(empty_database, folder / "mlflow.db")
    return search(comparing(supernet, folder / "search", tracking_uri=f"sqlite:///{folder}/mlflow.db")), folder


def compared(folder: Path) -> bytes:
    return (folder / "trust.jsonl").read_bytes()


def test_inherited_scores_beside_those_of_trained_networks(trusted: tuple[SearchSummary, Path], supernet: Path) -> None:
    summary, folder = trusted
    document = summary.to_dict()["trust"]
    assert (len(document["networks"]), document["epochs"], document["level"]) == (4, 1, 0.95)
    assert all(one["macs"] <= summary.report.plan.macs_limit for one in document["networks"])
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    assert {entry.path for entry in client.list_artifacts(summary.run_id or "")} >= {"trust.jsonl", "figures"}
    assert "figures/trust.svg" in [one.path for one in client.list_artifacts(summary.run_id or "", "figures")]
    note = client.get_run(summary.run_id or "").data.tags["mlflow.note.content"]
    assert summary.report.trust is not None
    assert summary.report.trust.in_words(0) in note
    again = comparing(supernet, folder / "search", tracking_uri=f"sqlite:///{folder}/mlflow.db", trust=None)
    assert search(replace(again, trust_epochs=None)).to_dict()["trust"] == document


def test_trained_accuracies_are_those_of_an_ordinary_training(
    trusted: tuple[SearchSummary, Path], supernet: Path, images: Path, tmp_path: Path
) -> None:
    """`train` gives the same accuracy, with the held-out images as validation images and the supernet's options."""
    summary, _ = trusted
    trust = summary.report.trust
    assert trust is not None
    config = read_checkpoint(supernet)["config"]
    held = workflow.list_images_of_supernet(None, config, cache_dir=None, reporter=Reporter())
    for part, listing in (("train", held.train), ("val", held.scoring)):
        for sample in listing.samples:
            folder = tmp_path / part / listing.classes[sample.label]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(listing.root / sample.path, folder)
    kept = ("lr", "momentum", "weight_decay", "label_smooth", "batch_size", "augment", "input_size")
    options = [word for name in kept for word in (f"--{name.replace('_', '-')}", config[name])]
    for one in trust.compared[:2]:
        choices = ",".join(map(str, one.genes))
        trained = run(
            tmp_path,
            *("--model", "shufflenet_oneshot", "--choices", choices, *options, "--total-iters", 3, "--threads", 1),
            *("--bn-images", 16, "--save-dir", tmp_path / str(one.index)),
        )
        assert trained.result.validation["val/top1"] == one.trained / one.images


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_comparisons_that_are_interrupted(
    count: int,
    trusted: tuple[SearchSummary, Path],
    supernet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest is trained by the next attempt, and more are added to a complete search.

    In this process, the network that is trained twice has the same loss both times, to the last bit.
    """
    losses: dict[str | None, list[float]] = {}
    train = TrainingLoop.run

    def noting(loop: TrainingLoop, *arguments: Any) -> Any:
        result = train(loop, *arguments)
        losses.setdefault(loop.config.choices, []).append(result.validation["val/loss"])
        return result

    monkeypatch.setattr(TrainingLoop, "run", noting)
    search(comparing(supernet, tmp_path, trust=None, trust_epochs=None))

    def interrupt(name: str, done: int) -> None:
        if (name, done) == ("training random networks", 2):
            signal.raise_signal(signal.SIGTERM)

    with StopFlag() as stop:
        stopped = search(comparing(supernet, tmp_path, workers=count), reporter=Reporter(interrupt), stop=stop)
    assert stopped.stopped_by == signal.SIGTERM
    assert len(compared(tmp_path).splitlines()) == 2
    (tmp_path / "trust.jsonl").write_bytes(compared(tmp_path)[:-5])
    assert (
        search(comparing(supernet, tmp_path, workers=count, trust_epochs=None)).report.trust == trusted[0].report.trust
    )
    assert compared(tmp_path) == compared(trusted[1] / "search")
    if count == 1:
        assert sorted(map(len, losses.values())) == [1, 1, 1, 2]
        assert all(len(set(found)) == 1 for found in losses.values())


def test_a_training_that_is_stopped_has_no_accuracy(
    trusted: tuple[SearchSummary, Path], supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingLoop.step

    def interrupt(loop: TrainingLoop, *arguments: Any) -> None:
        step(loop, *arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, StopFlag() as stop:
        patch.setattr(TrainingLoop, "step", interrupt)
        assert search(comparing(supernet, tmp_path), stop=stop).stopped_by == signal.SIGTERM
    assert not (tmp_path / "trust.jsonl").exists()


def test_a_training_that_diverges_counts_as_the_worst(
    supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = read_checkpoint(supernet)
    payload["config"]["lr"] = 1e30
    torch.save(payload, tmp_path / "supernet.pth.tar")
    request = comparing(tmp_path / "supernet.pth.tar", tmp_path / "s", trust_epochs=3)
    trust = search(request).report.trust
    assert trust is not None
    assert {one.trained for one in trust.compared} == {0}
    assert trust.to_dict(0)["tau"] is None
    assert "tau is undefined" in trust.in_words(0)


def of_accuracies(inherited: Sequence[int], trained: Sequence[int]) -> Trust:
    pairs = enumerate(zip(inherited, trained, strict=True))
    return Trust(tuple(Compared(index, 5, (0,) * 20, 1, *pair, images=100) for index, pair in pairs))


def test_agreement_and_its_interval() -> None:
    assert of_accuracies([1, 2, 3, 4], [10, 20, 30, 40]).tau() == 1
    assert of_accuracies([1, 2, 3, 4], [40, 30, 20, 10]).tau() == -1
    assert of_accuracies([1, 2, 3, 4], [1, 3, 2, 4]).tau() == pytest.approx(2 / 3)  # 5 pairs agree, 1 does not
    assert of_accuracies([1, 1, 3, 4], [1, 2, 3, 4]).tau() == pytest.approx(5 / np.sqrt(5 * 6))  # a tie
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(40):
        first, noise = generator.normal(size=(2, 40))
        second = 0.7 * first + np.sqrt(1 - 0.7**2) * noise
        of = of_accuracies((50 + 9 * first).round(4), (50 + 9 * second).round(4))  # type: ignore[arg-type]
        low, high = of.interval(0) or (1.0, 0.0)
        hits += low <= 2 / np.pi * np.arcsin(0.7) <= high
    assert hits >= 34  # of 40, at 95 %


def test_networks_to_compare() -> None:
    networks = random_networks(plan(), TABLE, 12)
    assert networks[:5] == random_networks(plan(), TABLE, 5)
    assert len({one.choices for one in networks}) == 12
    assert max(one.macs for one in networks) <= 330_000_000
    assert random_networks(plan(seed=1), TABLE, 1) != networks[:1]
    with pytest.raises(SearchError, match=r"fewer than --trust \(=4\) networks within --macs-limit \(=270,"):
        random_networks(plan(macs_limit=TABLE.lowest), TABLE, 4)


def test_comparisons_that_cannot_be_used(tmp_path: Path) -> None:
    networks = random_networks(plan(), TABLE, 2)
    record = TrustRecord(tmp_path)
    for one in networks:
        record.append(Compared(one.index, 5, one.choices, one.macs, 3, 4, 10))
    assert TrustRecord(tmp_path, 5).compared == record.compared
    record.require_same(networks)
    with pytest.raises(SearchError, match="has other networks than this version"):
        record.require_same(networks[::-1])
    with pytest.raises(ConfigError, match=r"--trust-epochs \(=3\) is not that of the networks in .* \(=5\)"):
        TrustRecord(tmp_path, 3)
    (tmp_path / "trust.jsonl").write_text("[]\n")
    with pytest.raises(SearchError, match="trust.jsonl' is damaged .*; remove it"):
        TrustRecord(tmp_path)
