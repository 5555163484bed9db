"""Listing, showing and comparing runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.compare import compare_runs
from shufflenet_mlflow.compare.charts import columns_of
from shufflenet_mlflow.compare.paired import Evaluation, Outcome, paired_test
from shufflenet_mlflow.config import command_of
from shufflenet_mlflow.tracking.names import NOTE_TAG
from shufflenet_mlflow.tracking.note import Note
from shufflenet_mlflow.tracking.provenance import command_line
from shufflenet_mlflow.tracking.recorder import Recorder
from shufflenet_mlflow.tracking.system_metrics import SystemMetrics
from shufflenet_mlflow.tracking.target import RunTarget
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.training import run


@pytest.fixture
def two(images: Path) -> tuple[str, str]:
    """Train two runs with different learning rates."""
    ids = [run(images, "--lr", rate, "--run-name", f"rate {rate}").run_id for rate in (0.02, 0.005)]
    return str(ids[0]), str(ids[1])


def as_json(shufflenet: Invoke, *words: object) -> Any:
    result = shufflenet(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_listing(two: tuple[str, str], shufflenet: Invoke) -> None:
    rows = as_json(shufflenet, "runs", "--columns", "name,lr,best/val_top1,tags.network,minutes", "--sort", "lr")
    assert [row["name"] for row in rows] == ["rate 0.02", "rate 0.005"]
    assert rows[0]["tags.network"] == "shufflenet_v2_x0_5"
    assert rows[0]["best/val_top1"] == rows[0]["metrics"]["best/val_top1"]
    rows = as_json(shufflenet, "runs", "--filter", "params.lr = '0.005' and metrics.`val/top1` >= 0")
    assert [row["run_id"] for row in rows] == [two[1]]
    assert [row["run_id"] for row in as_json(shufflenet, "runs", "--ascending")] == list(two)
    assert len(as_json(shufflenet, "runs", "--limit", 1)) == 1
    table = shufflenet("runs").stdout.splitlines()
    assert table[0].split()[:4] == ["run_id", "name", "status", "started"]
    assert {line.split()[0] for line in table[1:]} == set(two)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--filter", "lr is nice"), "lr is nice"),
        (("--experiment", "nowhere"), "there is no experiment 'nowhere'"),
        (("--sort", "minutes"), "--sort minutes is not possible"),
        (("--columns", "name,,lr"), "--columns and --sort take names"),
        (("show", "nonsense"), "'nonsense' is not a run ID"),
        (("show", "0" * 32), "there is no run 0000"),
    ],
)
def test_invalid_values(client: MlflowClient, shufflenet: Invoke, words: tuple[str, ...], expected: str) -> None:
    client.create_experiment("shufflenet")
    result = shufflenet("runs", *words)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_showing(client: MlflowClient, two: tuple[str, str], shufflenet: Invoke) -> None:
    document = as_json(shufflenet, "runs", "show", two[0])
    assert {entry["context"] for entry in document["data"]} == {"training", "validation"}
    assert document["data"][0]["images"] == 36
    assert document["versions"]["torch"]
    assert "cores" in document["hardware"]["cpu"]
    assert document["latest"]["iters"] == 12
    tags = client.get_run(two[0]).data.tags
    assert document["dirty"] == (tags.get("mlflow.source.git.dirty") == "true")
    text = shufflenet("runs", "show", f"runs:/{two[0]}").stdout
    assert "to repeat it" in text
    assert "shufflenet train --model shufflenet_v2_x0_5" in text


def test_options_of_a_command() -> None:
    config = {"lr": 0.1, "pretrained": True, "sync_bn": False, "train_dir": None, "choices": "0, 1"}
    assert command_of(config) == ["--lr", "0.1", "--pretrained", "--choices", "0, 1"]


# ---------------------------------------------------------------- comparing


@pytest.mark.long
def test_comparing(client: MlflowClient, two: tuple[str, str], shufflenet: Invoke, tmp_path: Path) -> None:
    for run_id in two:
        as_json(shufflenet, "eval", run_id)
    document = as_json(shufflenet, "compare", *two, "--out", tmp_path / "page")
    assert document["differing_params"] == {"lr": ["0.02", "0.005"]}
    rows = {row["metric"]: row for row in document["results"]}
    losses = rows["val/loss"]["values"]
    assert rows["val/loss"]["best"] == [two[losses.index(min(losses))]]
    assert rows["parameters"]["best"] == []
    assert not any(name.startswith(("system/", "train/lr")) for name in rows)
    [test] = document["paired_tests"]
    assert test["images"] == 15
    changed = len(test["only_second_right"]) - len(test["only_first_right"])
    assert changed / 15 == pytest.approx(test["second_top1"] - test["first_top1"])
    names = {Path(path).name for path in document["written"]}
    assert names == {"compare.html", "compare.json"}
    text = shufflenet("compare", *two).stdout
    assert "* best" in text
    assert "p = " in text


def test_results_on_different_images_are_not_ranked(
    client: MlflowClient, images: Path, two: tuple[str, str], shufflenet: Invoke, tmp_path: Path
) -> None:
    other = write_images(tmp_path / images.name / "val", per_class=4, seed=9)
    as_json(shufflenet, "eval", two[0])
    as_json(shufflenet, "eval", two[1], "--val-dir", other)
    rows = {row["metric"]: row for row in as_json(shufflenet, "compare", *two)["results"]}
    [top1] = [row for name, row in rows.items() if name.startswith("eval/") and name.endswith("/top1")]
    assert None not in top1["values"]  # both are called by the name of the folder
    assert [row["best"] for name, row in rows.items() if name.startswith("eval/")] == [[]] * 7
    assert rows["val/loss"]["best"]
    text = shufflenet("compare", *two).stdout
    assert f"eval/{images.name}-val was measured on different images in these runs: no value is marked as best" in text


def test_curves_over_epochs_and_time(client: MlflowClient, two: tuple[str, str]) -> None:
    comparison = compare_runs(client, [client.get_run(run_id) for run_id in two])
    curves = {(curve.metric, curve.run): curve for curve in comparison.curves}
    curve = curves["train/loss", 0]
    assert curve.iterations == (2, 4, 6, 8, 10, 12)
    assert curve.epochs == (0.5, 1, 1.5, 2, 2.5, 3)  # of 36 images by 8, the last 4 stay over
    assert list(curve.minutes) == sorted(curve.minutes)
    assert curve.minutes[0] >= 0


def test_infinite_values_are_left_out_of_curves(client: MlflowClient) -> None:
    experiment = client.create_experiment("diverging")
    runs = [client.create_run(experiment) for _ in range(2)]
    for step, loss in enumerate((2.0, math.inf, 3.0)):
        client.log_metric(runs[0].info.run_id, "train/loss", loss, step=step)
    [curve] = compare_runs(client, [client.get_run(run.info.run_id) for run in runs]).curves
    drawn = columns_of(curve)
    assert [value if math.isfinite(value) else None for value in drawn["y"]] == [2.0, None, 3.0]


def test_names_cannot_break_the_page(client: MlflowClient, images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    ids = [run(images, "--total-iters", 4, "--run-name", name).run_id for name in ("<b>$x", '& "quoted"')]
    as_json(shufflenet, "compare", *ids, "--out", tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert "<b>$x" not in page
    assert "&lt;b&gt;$x" in page


@pytest.mark.parametrize("times", [1, 2])
def test_too_few_runs(client: MlflowClient, shufflenet: Invoke, times: int) -> None:
    run_id = client.create_run(client.create_experiment("few")).info.run_id
    result = shufflenet("compare", *[run_id] * times)
    assert (result.exit_code, result.stdout) == (2, "")


def evaluation(run_id: str, right: int, images: int) -> Evaluation:
    return Evaluation(run_id, "pets", "digest", None, "checkpoint-000001.pth.tar", 1, right / images, "evaluation/pets")


def outcomes(right: set[int], images: int) -> dict[str, Outcome]:
    return {str(place): Outcome(str(place), "a", "a" if place in right else "b", 0.9) for place in range(images)}


def test_a_paired_test_by_hand() -> None:
    """Ten images are correct in one run only, split 1 to 9: p = 2 * (1 + 10) / 2**10."""
    first, second = {0, 20}, {*range(1, 10), 20}
    test = paired_test(evaluation("a", 2, 30), evaluation("b", 10, 30), [outcomes(first, 30), outcomes(second, 30)])
    assert (len(test.only_first), len(test.only_second), test.images) == (1, 9, 30)
    assert test.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert test.verdict.startswith("the second is better by 0.2667")
    same = paired_test(evaluation("a", 2, 30), evaluation("b", 2, 30), [outcomes(first, 30), outcomes(first, 30)])
    assert same.p_value == 1
    assert same.verdict.startswith("both have the same accuracy")


@pytest.mark.parametrize("password", ["plain", "pa'ss", "pa ss", 'p"w', "p@w"])
def test_no_password_stands_in_the_command(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    words = ["shufflenet", "train", "--tracking-uri", f"http://me:{password}@host:5000", "--run-name", "a @ b"]
    monkeypatch.setattr("sys.argv", words)
    assert command_line() == "shufflenet train --tracking-uri http://host:5000 --run-name 'a @ b'"


# ---------------------------------------------------------------- what a run says of itself


def test_a_note_keeps_what_people_write(client: MlflowClient) -> None:
    run_id = client.create_run(client.create_experiment("notes")).info.run_id
    target = RunTarget(client, run_id, Path())

    def note() -> str:
        return str(client.get_run(run_id).data.tags[NOTE_TAG])

    Note.of("training").send(target)
    client.set_tag(run_id, NOTE_TAG, f"Mine, before.\n\n{note()}\n\nMine, after.")
    Note.of(r"result \1 at http://me:secret@host").send(target)
    assert "training" not in note()
    assert "secret" not in note()
    assert r"result \1" in note()
    assert note().startswith("Mine, before.")
    assert note().endswith("Mine, after.")
    client.set_tag(run_id, NOTE_TAG, "All mine.")
    Note.of("x" * 9000).send(target)
    assert note().startswith("All mine.")


def test_system_metrics_stand_at_iterations(
    client: MlflowClient, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.02")
    summary = run(images)
    points = client.get_metric_history(summary.run_id, "system/cpu_utilization_percentage")
    steps = [point.step for point in points]
    assert steps == sorted(set(steps))
    assert steps
    assert set(steps) <= set(range(1, 13))
    without = run(images, "--no-system-metrics")
    assert not [name for name in client.get_run(without.run_id).data.metrics if name.startswith("system/")]


def test_a_monitor_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from shufflenet_mlflow.tracking import system_metrics as system

    class Broken:
        def collect_metrics(self) -> None:
            raise OSError("the driver has gone")

    monkeypatch.setattr(system, "_monitors", lambda: [Broken()])
    monkeypatch.setattr(system, "_interval", lambda: 0.001)
    recorder: Any = Recorder.__new__(Recorder)
    with SystemMetrics(recorder, lambda: 1) as metrics:
        assert metrics._thread is not None
        metrics._thread.join(5)
        assert not metrics._thread.is_alive()
