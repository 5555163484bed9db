"""Studies: the space, the steps of successive halving, the record, and small studies from begin to end."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config.study import Param, StudyPlan, plan_of
from shufflenet_mlflow.errors import ConfigError, StudyError
from shufflenet_mlflow.training.state import TrainingState
from shufflenet_mlflow.workflows.tune import TuneSummary, show_study, stop_study
from shufflenet_mlflow.workflows.tuning import claims
from shufflenet_mlflow.workflows.tuning.board import Board
from shufflenet_mlflow.workflows.tuning.claims import Claims
from shufflenet_mlflow.workflows.tuning.halving import (
    Close,
    Decide,
    Done,
    Sample,
    Train,
    Trial,
    best_of,
    decisions,
    next_step,
    rungs_of,
)
from shufflenet_mlflow.workflows.tuning.sampling import sample, seed_of
from tests.support.command_line import Invoke
from tests.support.payloads import assert_equal_payloads
from tests.support.studies import STUDY, decided, study_request, training, tune, without_ids
from tests.support.training import Reporter

SMALL = {"trials": 3, "rungs": 2, "generation": 2, "reduction": 3}
OF_TRAINING = ("state_dict", "optimizer_state_dict", "lr_scheduler_state_dict", "rng_state", "iters", "metrics", "best")

# ---------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("lr=log:0.003:0.3", Param("lr", "log", low=0.003, high=0.3)),
        ("--weight-decay=0:1e-3", Param("weight_decay", "float", low=0.0, high=1e-3)),
        ("batch-size=int:4:9", Param("batch_size", "int", low=4, high=9)),
        ("recipe=paper, modern", Param("recipe", "choices", ("paper", "modern"))),
        ("batch_size=16,32", Param("batch_size", "choices", (16, 32))),
        ("momentum=0.5,0.9", Param("momentum", "choices", (0.5, 0.9))),
        ("model=shufflenet_v2_x0_5,shufflenet_v2_x1_0", None),
    ],
)
def test_specs(text: str, param: Param | None) -> None:
    parsed = Param.parse(text)
    assert param is None or parsed == param
    assert Param.parse(f"{parsed.name}={parsed.spec}") == parsed


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("lr", "param-form"),
        ("=1,2", "param-form"),
        ("lr=", "param-form"),
        ("momentun=0.1,0.2", "param-unknown"),
        ("epochs=1,2", "param-fixed"),
        ("train_dir=a,b", "param-fixed"),
        ("lr=0.1,x", "param-word"),
        ("lr=0.1,", "param-word"),
        ("recipe=paper,", "param-choices"),
        ("lr=0.1,0.10", "param-choices"),
        ("lr=lin:1:2", "param-range"),
        ("lr=1:2:3:4", "param-range"),
        ("recipe=1:2", "param-range"),
        ("batch_size=4:9", "param-whole"),
        ("lr=a:1", "param-ends"),
        ("lr=1:0.5", "param-order"),
        ("lr=log:0:1", "param-order"),
        ("lr=0:1", "param-value"),
        ("batch_size=int:1:4", "param-value"),
        ("input_size=int:32:64", "param-value"),
    ],
)
def test_specs_that_cannot_work(text: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Param.parse(text)
    assert caught.value.code == code
    assert "--param" in str(caught.value)


def test_patience_does_not_go_with_a_study() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of({"param": ("lr=0.1,0.2",)}, {"patience": 3})
    assert caught.value.code == "study-patience"


def test_plans_survive_json() -> None:
    plan = plan_of({"param": ("lr=log:0.003:0.3", "recipe=paper,modern"), "metric": "val/loss"}, {"total_iters": 9})
    assert StudyPlan.from_json(plan.to_json()) == plan
    assert plan.direction == "minimize"
    for broken in ("", "[]", '{"space": 1}', plan.to_json().replace('"lr"', '"epochs"')):
        with pytest.raises(ConfigError):
            StudyPlan.from_json(broken)


# ---------------------------------------------------------------- successive halving


def value_of(trial: Trial, rung: int) -> float:
    return round(-abs(trial.params["lr"] - 0.05) * 10 + trial.number % 3 / 100 + rung / 10, 3)


def played(plan: StudyPlan, *, at_a_time: int, failing: Sequence[int] = ()) -> list[Trial]:
    """Return the trials of a study whose values are a function of the options, with many or few trials at a time."""
    trials: list[Trial] = []
    while not isinstance(step := next_step(plan, trials), Done):
        if isinstance(step, Sample):
            numbers = range(step.numbers.start, min(step.numbers.stop, step.numbers.start + at_a_time))
            trials += [
                Trial(number, params) for number, params in zip(numbers, sample(plan, trials, numbers), strict=True)
            ]
        elif isinstance(step, Train):
            for number in step.numbers[::-1][:at_a_time]:  # the last first
                trial = trials[number]
                known = {**trial.values, step.rung: value_of(trial, step.rung)}
                failed = number in failing and step.rung == number % 2
                trials[number] = replace(trial, failure="no") if failed else replace(trial, values=known)
        elif isinstance(step, Decide):
            for number in (*step.promoted, *step.pruned):
                word = "promoted" if number in step.promoted else "pruned"
                known_words = {**trials[number].decisions, step.rung: word}
                trials[number] = replace(trials[number], decisions=known_words, is_closed=word == "pruned")
        elif isinstance(step, Close):
            for number in step.numbers:
                trials[number] = replace(trials[number], is_closed=True)
    return trials


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "grid"])
def test_decisions_depend_on_no_order(sampler: str) -> None:
    space = ("lr=0.01,0.05,0.1", "batch_size=int:4:8") if sampler == "grid" else ("lr=log:0.003:0.3", "momentum=0:0.9")
    plan = plan_of({"param": space, "trials": 15, "sampler": sampler, "generation": 4}, {})
    lists = [list(decisions(plan, played(plan, at_a_time=number, failing=(3, 4)))) for number in (1, 2, 100)]
    assert lists[0] == lists[1] == lists[2]
    trials = played(plan, at_a_time=1)
    assert [sum(rung in trial.values for trial in trials) for rung in range(3)] == [15, 5, 1]
    assert best_of(plan, trials) is next(trial for trial in trials if trial.state == "complete")
    assert len({json.dumps(trial.params) for trial in trials}) == 15


def test_seeds_follow_from_seed_and_number_only() -> None:
    plan = plan_of({"param": ("lr=log:0.003:0.3",)}, {"seed": 3})
    others = [plan_of({"param": ("momentum=0:0.9",), "trials": 4}, {"seed": 3}), replace(plan, options={"seed": 4})]
    assert seed_of(plan, 5) == seed_of(others[0], 5) != seed_of(plan, 6)
    assert seed_of(plan, 5) != seed_of(others[1], 5)


def test_values_decide_what_is_drawn() -> None:
    plan = plan_of({"param": ("lr=log:0.003:0.3",), "trials": 16}, {})
    first = [Trial(number, params) for number, params in enumerate(sample(plan, [], range(8)))]
    good = [replace(trial, values={0: value_of(trial, 0)}) for trial in first]
    bad = [replace(trial, values={0: -value_of(trial, 0)}) for trial in first]
    assert sample(plan, good, range(8, 16)) == sample(plan, good, range(8, 16)) != sample(plan, bad, range(8, 16))


def test_rungs() -> None:
    plan = plan_of({"param": ("lr=log:0.003:0.3",)}, {})
    assert rungs_of(plan, 100) == (11, 33, 100)
    assert rungs_of(plan, 100, every=10) == (10, 30, 100)
    assert rungs_of(replace(plan, rungs=1), 100) == (100,)
    for total, every in ((2, None), (100, 60)):
        with pytest.raises(ConfigError) as caught:
            rungs_of(plan, total, every)
        assert caught.value.code == "study-too-short"


# ---------------------------------------------------------------- the record


@pytest.fixture(params=["file", "sqlite"])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Board:
    address = None if request.param == "file" else f"sqlite:///{tmp_path}/studies.db"
    plan = plan_of({"param": ("lr=log:0.003:0.3", "recipe=paper,modern"), "trials": 4}, {"total_iters": 9})
    return Board.create("x", address, tmp_path / "study", plan, anew=True)


def test_what_is_recorded_is_found_again(board: Board, tmp_path: Path) -> None:
    for number, params in enumerate(sample(board.plan, [], range(3))):
        board.add(number, params)
    board.add(1, {"lr": 0.1, "recipe": "paper"})  # another worker has drawn it, too, and later
    board.report(0, 0, 3, 0.1 + 0.2)
    board.report(0, 0, 3, 0.7)  # the first value stays
    board.report(1, 0, 3, 1 / 3)
    board.decide(0, 0, "promoted")
    board.decide(1, 0, "pruned")
    board.decide(1, 0, "promoted")
    board.fail(2, "no such thing")
    board.complete(0)
    path = tmp_path / "study" / "study.jsonl"
    if path.exists():
        with open(path, "ab") as file:
            file.write(b'{"op_code": 4, "wor')  # of a process that was killed
    found = Board.find("x", None if path.exists() else f"sqlite:///{tmp_path}/studies.db", tmp_path / "study")
    assert found is not None
    assert found.plan == board.plan
    found.note(2, "run", "unknown")
    trials = found.trials()
    assert trials == board.trials()
    assert [(trial.values, trial.decisions, trial.state) for trial in trials] == [
        ({0: 0.1 + 0.2}, {0: "promoted"}, "complete"),
        ({0: 1 / 3}, {0: "pruned"}, "pruned"),
        ({}, {}, "failed"),
    ]
    assert trials[1].params != {"lr": 0.1, "recipe": "paper"}


def test_claims(board: Board) -> None:
    one = Claims(board.storage, "x", "here")
    other = Claims(board.storage, "x", "here")
    claim = one.take("3 0")
    assert claim is not None
    assert other.take("3 0") is None
    assert other.take("4 0") is not None
    one.beat()
    one.give_up(claim)
    assert other.take("3 0") is not None


# ---------------------------------------------------------------- whole studies


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> TuneSummary:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    return tune(study_request(images, folder / "study", tracking_uri=f"sqlite:///{folder}/mlflow.db", **SMALL))


def test_a_small_study(
    images: Path, undisturbed: TuneSummary, client: MlflowClient, shufflenet: Invoke, tmp_path: Path
) -> None:
    request = study_request(images, tmp_path / "study", **SMALL)
    summary = tune(request)
    document = summary.to_dict()
    assert decided(summary) == decided(undisturbed)
    assert [trial["state"] for trial in document["trials"]].count("complete") == 1
    assert [len(trial["rungs"]) for trial in document["trials"]].count(2) == 1
    assert [rung["iters"] for rung in document["trials"][document["best"]["number"]]["rungs"]] == [4, 12]

    parent = client.get_run(document["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert json.loads(parent.data.tags["study.best"])["number"] == document["best"]["number"]
    assert "shufflenet train" in parent.data.tags["mlflow.note.content"]
    assert parent.data.params["space.lr"] == "log:0.003:0.3"
    names = {entry.path for folder in ("", "figures") for entry in client.list_artifacts(parent.info.run_id, folder)}
    assert {"decisions.jsonl", "study.json", "figures/history.svg", "figures/parallel_coordinates.svg"} <= names
    for trial in document["trials"]:
        child = client.get_run(trial["run_id"])
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.data.tags["study"], child.data.tags["study.trial"]) == (STUDY, str(trial["number"]))
        complete = trial["state"] == "complete"
        assert child.info.status == ("FINISHED" if complete else "KILLED")
        assert child.data.tags["study.state"].startswith(
            "complete" if complete else "pruned at rung 1 of 2, iteration 4"
        )
        history = [point.value for point in client.get_metric_history(trial["run_id"], "val/loss")]
        assert [rung["value"] for rung in trial["rungs"]] == [history[0], history[-1]][: len(trial["rungs"])]

    again = tune(replace(request, plan=None))
    assert again.to_dict() == document
    result = shufflenet("tune", "show", STUDY, "--save-dir", tmp_path / "study", "--json")
    assert json.loads(result.stdout)["trials"] == document["trials"]
    result = shufflenet("tune", "stop", STUDY, "--save-dir", tmp_path / "study")
    assert "is complete, so there is nothing to stop" in result.stdout
    elsewhere = show_study(replace(request, save_dir=tmp_path / "nowhere"))
    assert without_ids(elsewhere.to_dict()) == without_ids(document)
    with pytest.raises(ConfigError) as caught:
        tune(study_request(images, tmp_path / "study", **{**SMALL, "trials": 4}))
    assert caught.value.code == "study-differs"


def best_payload(summary: TuneSummary, folder: Path) -> dict[str, Any]:
    best = summary.report.best
    assert best is not None
    payload = read_checkpoint(folder / f"trial-{best.number:04}" / "bnps-checkpoint-000012.pth.tar")
    return {key: value for key, value in payload.items() if key in OF_TRAINING}


def plain_payload(summary: TuneSummary, shufflenet: Invoke, folder: Path) -> dict[str, Any]:
    """Train once with the command that repeats the best trial."""
    command = summary.report.command()
    assert command is not None
    result = shufflenet(*command.split()[1:], "--val-interval", 4, "--save-dir", folder, "--no-log-models")
    assert result.exit_code == 0, result.output
    payload = read_checkpoint(folder / "bnps-checkpoint-000012.pth.tar")
    return {key: value for key, value in payload.items() if key in OF_TRAINING}


def test_the_best_is_what_a_plain_training_gives(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    summary = tune(study_request(images, tmp_path / "study", **SMALL))
    assert_equal_payloads(
        best_payload(summary, tmp_path / "study"), plain_payload(summary, shufflenet, tmp_path / "plain")
    )


@pytest.mark.long
def test_momentum_that_is_dropped_at_a_rung_is_noticed(
    images: Path, shufflenet: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = TrainingState.load_state_dict

    def forget(self: TrainingState, payload: Any) -> None:
        load(self, payload)
        self.optimizer.state.clear()

    with monkeypatch.context() as patched:
        patched.setattr(TrainingState, "load_state_dict", forget)
        summary = tune(study_request(images, tmp_path / "study", **SMALL))
    with pytest.raises(AssertionError):
        assert_equal_payloads(
            best_payload(summary, tmp_path / "study"), plain_payload(summary, shufflenet, tmp_path / "plain")
        )


def test_a_study_can_be_stopped(images: Path, tmp_path: Path) -> None:
    request = study_request(images, tmp_path / "study", **SMALL)
    with pytest.raises(StudyError) as caught:
        stop_study(request)
    assert caught.value.code == "study-unknown"


@pytest.mark.parametrize("by", ["time", "command"])
def test_a_study_that_is_stopped_goes_on(
    by: str, images: Path, undisturbed: TuneSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    request = study_request(images, tmp_path / "study", **SMALL, time_budget=0.01 if by == "time" else None)

    def ask_to_stop(phase: str, done: int) -> None:
        if by == "command" and "training" in phase and done == 2:
            stop_study(request)
            time.sleep(0.2)

    stopped = tune(request, reporter=Reporter(ask_to_stop))
    assert not stopped.report.is_complete
    assert {trial["state"] for trial in show_study(request).to_dict()["trials"]} <= {"paused", "waiting"}
    assert stopped.reason == ("time is over" if by == "time" else "stopped by `tune stop`")
    assert stopped.stopped_by is None
    assert decided(tune(replace(request, plan=None, time_budget=None))) == decided(undisturbed)


def test_a_study_none_of_whose_trials_can_be_trained(images: Path, tmp_path: Path) -> None:
    request = study_request(images, tmp_path / "study", param=("lr=1e19,1e20",), **{**SMALL, "trials": 2})
    with pytest.raises(StudyError) as caught:
        tune(request)
    assert caught.value.code == "study-all-failed"
    assert [trial.state for trial in show_study(request).trials] == ["failed", "failed"]


# ---------------------------------------------------------------- several seeds, and whole studies side by side


def test_repeated_trainings(images: Path, shufflenet: Invoke, client: MlflowClient) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in training(images).items()]

    def repeat(name: str, *more: object) -> dict[str, Any]:
        words = ("train", "--repeat", 2, "--job", name, *options, "--no-system-metrics", *more, "--json")
        result = shufflenet(*words)
        assert result.exit_code == 0, result.output
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    one, other = repeat("one", "--lr", 0.02, "--seed", 3), repeat("other", "--lr", 0.0002, "--seed", 3)
    assert [trial["params"]["seed"] for trial in one["trials"]] == [3, 4]
    parent = client.get_run(one["parent_run_id"])
    values = [client.get_run(trial["run_id"]).data.metrics["val/top1"] for trial in one["trials"]]
    assert parent.data.metrics["repeats/top1/mean"] == one["mean"] == sum(values) / 2
    assert parent.data.metrics["repeats/top1/std"] == one["std"]
    assert repeat("one", "--lr", 0.02, "--seed", 3) == one

    compared = shufflenet("compare", one["parent_run_id"], other["parent_run_id"], "--json")
    assert compared.exit_code == 0, compared.output
    document = json.loads(compared.stdout)
    [difference] = [entry for entry in document["differences"] if entry["metric"] == "val/top1"]
    assert difference["seeds"] == [3, 4]
    assert difference["mean"] == pytest.approx(other["mean"] - one["mean"])
    assert document["groups"][0]["metrics"]["val/top1"]["std"] == one["std"]
    shown = shufflenet("compare", one["parent_run_id"], other["parent_run_id"])
    assert "95 % bootstrap interval" in shown.stdout
    marked = [line.split() for line in shown.stdout.splitlines() if line.split()[1:2] == ["val/top1"] and "*" in line]
    best = one if one["mean"] > other["mean"] else other
    assert best["parent_run_id"][:8] in [words[0] for words in marked]
    assert (len(marked) == 1) == (one["mean"] != other["mean"])

    listed = json.loads(shufflenet("runs", "--study", "one", "--json").stdout)
    assert {run["run_id"] for run in listed} == {one["parent_run_id"], *(trial["run_id"] for trial in one["trials"])}
    best = json.loads(shufflenet("compare", "--study", "one", "--json").stdout)
    assert {run["run_id"] for run in best["runs"]} == {trial["run_id"] for trial in one["trials"]}


def test_a_study_keeps_what_rungs_and_best_need(images: Path, tmp_path: Path, client: MlflowClient) -> None:
    """Each trial its last and its best checkpoint, on the disk and in MLflow, although it validates and saves often."""
    more = {"save_interval": 1, "val_interval": 2, "total_iters": 18}
    summary = tune(study_request(images, tmp_path / "study", training=more, **SMALL))
    for trial in summary.report.trials:
        assert trial.run_id is not None
        kept = [path.name for path in (tmp_path / "study" / f"trial-{trial.number:04}").glob("*.pth.tar")]
        uploaded = [entry.path for entry in client.list_artifacts(trial.run_id, "checkpoints")]
        assert 1 <= len(kept) <= 3, kept  # a final one does not replace that of its iteration
        assert len([name for name in uploaded if name.endswith(".tar")]) == len(kept)


def test_a_study_without_runs_is_named(shufflenet: Invoke, client: MlflowClient, images: Path) -> None:
    """With the studies that are there; a filter that finds nothing is no mistake."""
    run = client.create_run(client.create_experiment("shufflenet"), tags={"study": "sizes"})
    result = shufflenet("runs", "--study", "nope")
    expected = "has no run of a study 'nope' (it holds sizes); --experiment NAME looks into another one"
    assert (result.exit_code, expected in result.output) == (1, True), result.output
    assert json.loads(shufflenet("runs", "--study", "sizes", "--json").stdout)[0]["run_id"] == run.info.run_id
    assert shufflenet("runs", "--study", "sizes", "--filter", "params.seed = '1'").exit_code == 0


def test_the_run_that_mlflow_run_creates_becomes_the_studys(
    images: Path, tmp_path: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = client.create_run(client.create_experiment("shufflenet"))
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    summary = tune(study_request(images, tmp_path / "study", **{**SMALL, "trials": 1, "rungs": 1}))
    assert summary.report.parent_run_id == run.info.run_id
    [trial] = summary.report.trials
    assert client.get_run(str(trial.run_id)).data.tags["mlflow.parentRunId"] == run.info.run_id
    assert client.get_run(run.info.run_id).data.tags["study"] == STUDY


def test_lines_of_progress_show_a_trials_length(shufflenet: Invoke, images: Path) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in training(images).items()]
    study = ("--study", "x", "--param", "lr=0.01,0.02", "--sampler", "random", "--trials", 1, "--rungs", 1)
    result = shufflenet("tune", *study, *options, "--no-system-metrics")
    assert result.exit_code == 0, result.output
    assert "iteration  2/12  " in result.stderr
