"""Asynchronous studies: the decisions of workers that are faster or slower, killed, or left without their record."""

import heapq
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.config.study import StudyPlan, plan_of
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.workflows.tune import show_study
from shufflenet_mlflow.workflows.tuning.asynchronous import (
    asynchronous_decisions,
    next_asynchronous_step,
    place_of,
    remembered_step,
    under_way,
)
from shufflenet_mlflow.workflows.tuning.board import Board
from shufflenet_mlflow.workflows.tuning.halving import (
    PROMOTED,
    PRUNED,
    Close,
    Decide,
    Done,
    Promote,
    Sample,
    Step,
    Train,
    Trial,
)
from shufflenet_mlflow.workflows.tuning.sampling import sample
from tests.support.studies import decided, study_request, tune, without_ids


def plan(**more: Any) -> StudyPlan:
    asked = {"param": ("lr=log:0.003:0.3",), "asynchronous": True, "reduction": 2, "trials": 12, "sampler": "random"}
    return plan_of({**asked, **more}, {})


def trial(number: int, *values: float, promoted: int = 0, **more: Any) -> Trial:
    """Return a trial with these values, which was promoted so often."""
    return Trial(
        number,
        {"lr": 0.1},
        dict(enumerate(values)),
        dict.fromkeys(range(promoted), PROMOTED),
        steps=dict.fromkeys(range(promoted + 1), (number, 0)),
        **more,
    )


@pytest.mark.parametrize(
    ("trials", "step"),
    [
        ([], Sample(range(1))),
        ([trial(0)], Train(0, (0,))),
        ([trial(0, 0.5)], Sample(range(1, 2))),
        ([trial(0, 0.5), trial(1, 0.7)], Promote(1, 0)),
        ([trial(0, 0.5), trial(1, 0.5)], Promote(0, 0)),
        ([trial(0, 0.5), trial(1, 0.7, promoted=1)], Train(1, (1,))),
        ([trial(0, 0.5), trial(1, 0.7, 0.8, promoted=1)], Sample(range(2, 3))),
        ([trial(0, 0.5), trial(1, 0.7, promoted=1, failure="no")], Sample(range(2, 3))),
        # the best of the lower rung, of two that are among the better half, and then one that is good by now
        ([trial(0, 0.5), trial(1, 0.7), trial(2, 0.6), trial(3, 0.1)], Promote(1, 0)),
        ([trial(0, 0.5), trial(1, 0.7, 0.8, promoted=1), trial(2, 0.6), trial(3, 0.1)], Promote(2, 0)),
        # the highest rung first
        (
            [trial(0, 0.5, 0.6, promoted=1), trial(1, 0.7, 0.8, promoted=1), trial(2, 0.9), trial(3, 0.8)],
            Promote(1, 1),
        ),
        # at the end of the last rung a trial is complete
        ([trial(0, 0.5), trial(1, 0.7, 0.8, 0.9, promoted=2)], Close((1,))),
    ],
)
def test_what_a_free_worker_does(trials: list[Trial], step: Step) -> None:
    assert next_asynchronous_step(plan(), trials) == step


def test_what_others_train_is_not_waited_for() -> None:
    trials = [trial(0), trial(1, 0.7), trial(2, 0.5, promoted=1)]
    assert next_asynchronous_step(plan(), trials, {0, 2}) == Promote(1, 0)
    assert next_asynchronous_step(plan(), trials, {2}) == Train(0, (0,))
    assert next_asynchronous_step(plan(), trials[:1], {0}) == Sample(range(1, 2))
    assert next_asynchronous_step(plan(trials=1), trials[:1], {0}) == Train(0, (0,))


def test_how_a_study_ends() -> None:
    few = plan(trials=2, reduction=3)
    paused = [trial(0, 0.5), trial(1, 0.7)]
    assert next_asynchronous_step(few, paused) == Promote(1, 0)  # although it is no third of them: none has arrived
    failed = [paused[0], trial(1, 0.7, promoted=1, failure="no", is_closed=True)]
    assert next_asynchronous_step(few, failed) == Promote(0, 0)
    arrived = [paused[0], trial(1, 0.7, 0.8, 0.9, promoted=2, is_closed=True)]
    assert next_asynchronous_step(few, arrived) == Decide(0, (), (0,))
    half_done = [replace(paused[0], decisions={0: PRUNED}), arrived[1]]
    assert next_asynchronous_step(few, half_done) == Decide(0, (), (0,))
    assert next_asynchronous_step(few, [replace(half_done[0], is_closed=True), arrived[1]]) == Done()


# ---------------------------------------------------------------- workers of all kinds


@dataclass
class Played:
    """A study whose values are a function of the options, and workers that need times of their own."""

    plan: StudyPlan
    seed: int = 0
    workers: int = 1
    trials: list[Trial] = field(default_factory=list)
    places: dict[int, dict[int, tuple[int, int]]] | None = None
    killing: float = 0.0
    waited: int = 0
    """Times that a worker had nothing to do before all trials were drawn."""

    def play(self) -> "Played":
        times = random.Random(self.seed)
        free = [(0.0, worker, -1, -1) for worker in range(self.workers)]
        busy: dict[int, int] = {}
        while free:
            now, worker, number, rung = heapq.heappop(free)
            if number >= 0:
                del busy[number]
                if times.random() >= self.killing:  # otherwise its process is gone, and nothing is recorded
                    self.record(number, rung)
            step = self.step({*busy})
            while not isinstance(step, Train | Done):
                self.act(step)
                step = self.step({*busy})
            if isinstance(step, Done):
                continue
            if (number := step.numbers[0]) in busy:  # wait until the next of the others is free
                self.waited += len(self.trials) < self.plan.trials
                next_end = min(end for end, _, trained, _ in free if trained >= 0)
                heapq.heappush(free, (next_end + 0.001, worker, -1, -1))
                continue
            busy[number] = worker
            heapq.heappush(free, (now + times.uniform(0.1, 10), worker, number, step.rung))
        return self

    def step(self, busy: set[int]) -> Step:
        step = next_asynchronous_step(self.plan, self.trials, busy)
        if self.places is None or isinstance(step, Train | Close):
            return step
        return remembered_step(self.trials, self.places, at_place=isinstance(step, Sample | Promote)) or step

    def record(self, number: int, rung: int) -> None:
        known = self.trials[number]
        if number % 7 == 3 and rung == number % 2:
            self.trials[number] = replace(known, failure="no", is_closed=True)
        else:
            value = round(-abs(known.params["lr"] - 0.05) * 10 + (number * 31 + rung * 17) % 10 / 20, 3)
            self.trials[number] = replace(known, values={**known.values, rung: value})

    def act(self, step: Step) -> None:
        if isinstance(step, Sample):
            place = place_of(self.trials, 0)
            number = step.numbers.start
            params = {"lr": 0.003 * 1.2 ** (number * 7 % 25)}
            if self.plan.sampler == "tpe":
                [params] = sample(self.plan, self.trials, step.numbers)
            self.trials.append(Trial(number, params, steps={0: place}))
        elif isinstance(step, Promote):
            self.require_that_it_may(step)
            known, place = self.trials[step.number], place_of(self.trials, step.rung)
            decisions, steps = {**known.decisions, step.rung: PROMOTED}, {**known.steps, step.rung + 1: place}
            self.trials[step.number] = replace(known, decisions=decisions, steps=steps)
        elif isinstance(step, Close):
            for number in step.numbers:
                self.trials[number] = replace(self.trials[number], is_closed=True)
        elif isinstance(step, Decide):
            for number in step.pruned:
                known = self.trials[number]
                decisions = {**known.decisions, step.rung: PRUNED}
                self.trials[number] = replace(known, decisions=decisions, is_closed=True)

    def require_that_it_may(self, step: Promote) -> None:
        """Check a promotion by counting those that are better."""
        of_rung = {known.number: known.values[step.rung] for known in self.trials if step.rung in known.values}
        better = sum(value > of_rung[step.number] for value in of_rung.values())
        at_end = len(self.trials) == self.plan.trials and not under_way(self.trials)
        assert self.places is not None or at_end or better < len(of_rung) // self.plan.reduction

    @property
    def decisions(self) -> str:
        return "".join(f"{json.dumps(entry)}\n" for entry in asynchronous_decisions(self.trials))

    def decisions_without_known(self) -> list[dict[str, Any]]:
        return [{**entry, "known": None} for entry in asynchronous_decisions(self.trials)]


def check_the_end(played: Played) -> None:
    """Check that each trial is at an end, and each that is not complete rightly so."""
    assert len(played.trials) == played.plan.trials
    assert {known.state for known in played.trials} <= {"complete", "pruned", "failed"}
    assert any(known.state == "complete" for known in played.trials)
    for rung in range(played.plan.rungs - 1):
        ranked = sorted((-known.values[rung], known.number) for known in played.trials if rung in known.values)
        for _, number in ranked[: len(ranked) // played.plan.reduction]:
            assert played.trials[number].decisions[rung] == PROMOTED
    places = sorted(place for known in played.trials for place, _ in known.steps.values())
    assert places == list(range(len(places)))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("reduction", [2, 3])
def test_every_trial_comes_to_an_end_and_nobody_waits(workers: int, reduction: int) -> None:
    lists = set()
    for seed in range(20):
        played = Played(plan(reduction=reduction, trials=20), seed, workers).play()
        check_the_end(played)
        assert played.waited == 0
        lists.add(played.decisions)
    assert (len(lists) == 1) == (workers == 1)  # with several they depend on who was faster


def test_one_worker_decides_the_same_however_often_it_is_killed() -> None:
    undisturbed = Played(plan(sampler="tpe", trials=16)).play().decisions
    for seed in range(3):
        assert Played(plan(sampler="tpe", trials=16), seed, killing=0.4).play().decisions == undisturbed


def test_without_its_record_a_study_repeats_the_decisions_that_are_known() -> None:
    for seed in range(10):
        first = Played(plan(trials=20), seed, workers=4).play()
        places = {known.number: dict(known.steps) for known in first.trials}
        again = Played(first.plan, places=places).play()
        assert again.decisions_without_known() == first.decisions_without_known()
        forgotten = random.Random(seed)
        some = {
            number: {rung: place for rung, place in steps.items() if forgotten.random() < 0.7}
            for number, steps in places.items()
        }
        kept = Played(first.plan, places=some).play()
        check_the_end(kept)
        for number, steps in some.items():
            assert steps.keys() <= kept.trials[number].steps.keys()


def test_values_decide_what_is_drawn_once_there_are_ten() -> None:
    of = plan(sampler="tpe", trials=30)
    known = [trial(number, number / 10) for number in range(11)]
    params = [{"lr": 0.004 * 1.3**number} for number in range(11)]
    good = [replace(one, params=lr) for one, lr in zip(known, params, strict=True)]
    bad = [replace(one, values={0: -one.values[0]}) for one in good]
    drawn = [sample(of, trials, range(11, 12)) for trials in (good, good, bad)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sample(of, good[:5], range(5, 6)) == sample(of, bad[:5], range(5, 6))


@pytest.mark.parametrize("address", [None, "sqlite"])
def test_the_record_keeps_the_order(address: str | None, tmp_path: Path) -> None:
    uri = None if address is None else f"sqlite:///{tmp_path}/studies.db"
    board = Board.create("x", uri, tmp_path / "study", plan(), anew=True)
    board.add(0, {"lr": 0.1}, (0, 0))
    board.report(0, 0, 3, 0.5)
    board.add(1, {"lr": 0.2}, (1, 1))
    board.promote(0, 0, (2, 1))
    board.promote(0, 0, (7, 9))  # another worker, and later
    found = Board.find("x", uri, tmp_path / "study")
    assert found is not None
    assert found.plan.asynchronous
    first, second = found.trials()
    assert (first.steps, first.decisions, second.steps) == ({0: (0, 0), 1: (2, 1)}, {0: PROMOTED}, {0: (1, 1)})


# ---------------------------------------------------------------- whole studies

SMALL = {"trials": 4, "rungs": 2, "reduction": 2, "asynchronous": True}


def test_a_small_study(images: Path, client: MlflowClient, tmp_path: Path) -> None:
    request = study_request(images, tmp_path / "study", **SMALL)
    summary = tune(request)
    document = summary.to_dict()
    assert summary.report.is_complete
    lines = [json.loads(line) for line in decided(summary).splitlines()]
    kinds = [line["decision"] for line in lines]
    assert kinds[:6] == ["sampled", "value", "sampled", "value", "promoted", "value"]
    assert [line["known"] for line in lines[:5:2]] == [0, 1, 2]
    first = min((0, 1), key=lambda number: summary.report.trials[number].values[0])
    assert (lines[4]["trial"], lines[4]["rung"]) == (first, 0)
    assert client.get_run(document["parent_run_id"]).data.params["study.asynchronous"] == "True"
    for found in document["trials"]:
        run = client.get_run(found["run_id"])
        steps = json.loads(run.data.tags["study.steps"])
        assert len(steps) == len(found["rungs"])
        complete = found["state"] == "complete"
        assert run.info.status == ("FINISHED" if complete else "KILLED")
        told = "complete" if complete else "pruned at rung 1 of 2, iteration 6: val/loss"
        assert run.data.tags["study.state"].startswith(told)
    assert without_ids(show_study(replace(request, save_dir=tmp_path / "none")).to_dict()) == without_ids(document)
    restored = tune(replace(request, plan=None, save_dir=tmp_path / "elsewhere"))
    assert decided(restored) == decided(summary)
    with pytest.raises(ConfigError, match=r"was begun otherwise \(--asynchronous\)"):
        tune(study_request(images, tmp_path / "study", **{**SMALL, "asynchronous": False}))
