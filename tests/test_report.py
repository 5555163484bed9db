"""An evaluation in detail: counted by hand, and as it is logged."""

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.listing import ImageListing, Samples
from shufflenet_mlflow.data.loader import Batch
from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.evaluation.plots import figures_of
from shufflenet_mlflow.evaluation.report import Observer, Outcomes, Report
from shufflenet_mlflow.models.loaded import label_outputs
from shufflenet_mlflow.runtime.serialization import to_csv, to_json
from shufflenet_mlflow.runtime.text import visible
from shufflenet_mlflow.workflows import eval as evaluation
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.training import run


def report_of(labels: list[int], predicted: list[int], probability: list[float], classes: int = 3) -> Report:
    outcomes = Outcomes(
        tuple(f"{place}.png" for place in range(len(labels))),
        np.array(labels),
        np.array(predicted),
        np.array(probability),
        np.array(probability),
    )
    return Report(outcomes, tuple(f"class {index}" for index in range(classes)))


# Four of class 0, two of class 1, none of class 2; four right.
SIX = report_of([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2], [0.9, 0.8, 0.9, 0.6, 0.7, 0.95])


def test_classes() -> None:
    rows = SIX.class_rows()
    assert [(row.name, row.images, row.accuracy, row.precision) for row in rows] == [
        ("class 0", 4, 0.75, 1.0),
        ("class 1", 2, 0.5, 0.5),
        ("class 2", 0, None, 0.0),
    ]
    assert SIX.mean_class_accuracy == pytest.approx((0.75 + 0.5) / 2)
    assert SIX.confusion_CC.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert SIX.classes_csv().splitlines()[3] == "class 2,0,,0.0000"
    assert SIX.confusion_csv().splitlines()[1] == "class 0,3,1,0"


def test_many_classes_keep_only_pairs_that_occur(tmp_path: Path) -> None:
    """A matrix of 40,000 classes would take 13 GB."""
    report = report_of([0, 0, 39_999], [0, 7, 7], [0.9, 0.8, 0.7], classes=40_000)
    assert report.confusion_csv().splitlines() == [
        "true,predicted,images",
        "class 0,class 0,1",
        "class 0,class 7,1",
        "class 39999,class 7,1",
    ]
    assert len(report.class_rows()) == 40_000
    assert report.class_rows()[7].precision == 0
    assert set(figures_of(report, tmp_path)) == {"classes.png", "calibration.png", "mistakes.png"}


def test_the_most_confident_mistakes_come_first() -> None:
    assert SIX.worst_mistakes(9) == [5, 3]
    assert SIX.worst_mistakes(1) == [5]


def test_calibration_by_hand() -> None:
    """Two bins: 0.8..0.867 is correct half of the time, 0.267..0.333 never."""
    report = report_of([0, 0, 0, 0], [0, 1, 1, 1], [0.82, 0.84, 0.3, 0.3])
    bins = report.calibration_bins()
    assert [(entry.images, entry.accuracy) for entry in bins] == [(2, 0.0), (2, 0.5)]
    expected = (2 * abs(0 - 0.3) + 2 * abs(0.5 - 0.83)) / 4
    assert report.calibration_error() == pytest.approx(expected, abs=1e-6)
    assert report_of([0, 0], [0, 0], [1.0, 1.0]).calibration_error() == pytest.approx(0)


def test_observing_batches() -> None:
    """Order and size of batches do not matter, and images may be left out."""
    samples = Samples.of((f"c/{place}.png", place % 2, 1) for place in range(5))
    listing = ImageListing(Path("root"), ("a", "b"), samples)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    observer = Observer(listing)
    for places in ([3, 1], [4]):
        at = torch.tensor(places)
        batch = Batch(torch.zeros(len(places), 3, 1, 1), at % 2, at, None, ())
        observer(batch, logits[at])
    outcomes = observer.outcomes()
    assert outcomes.paths == ("c/3.png", "c/1.png", "c/4.png")
    assert outcomes.is_correct.tolist() == [True, True, True]
    assert outcomes.probability_N[0] == pytest.approx(torch.softmax(logits[3], 0)[1].item())
    rows = list(csv.DictReader(io.StringIO(outcomes.to_csv(("a", "b,c")))))
    assert [row["label"] for row in rows] == ["b,c", "b,c", "a"]


def test_csv_of_names_with_line_ends() -> None:
    """Readers disagree about which characters end a line."""
    names = ["a\rb", "a\nb", "a\r\nb", 'a"b', "a,b", "a"]
    assert to_csv([names, [1, 0.5]]) == r'a\rb,a\nb,a\r\nb,"a""b","a,b",a' + "\n1,0.5\n"
    assert next(csv.reader(io.StringIO(to_csv([names]), newline=""))) == list(map(visible, names))


@pytest.mark.parametrize("classes", [2, 30, 120])
def test_figures_are_drawn_for_any_number_of_classes(classes: int, images: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    listing = list_images(images / "val")
    count = len(listing)
    report = Report(
        Outcomes(
            tuple(sample.path for sample in listing.samples),
            generator.integers(0, classes, count),
            generator.integers(0, classes, count),
            generator.random(count),
            generator.random(count),
        ),
        tuple(f"a rather long name of class ${index}$" for index in range(classes)),
    )
    for name, draw in figures_of(report, listing.root).items():
        draw().savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5_000
    gallery = figures_of(report, listing.root)["mistakes.png"]()
    assert sum(bool(axes.images) for axes in gallery.axes) == (~report.outcomes.is_correct).sum()


# ---------------------------------------------------------------- logged


def evaluate(shufflenet: Invoke, *words: object) -> Any:
    result = shufflenet("eval", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_predictions_of_every_image_are_kept(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    summary = run(images)
    found = evaluate(shufflenet, summary.run_id)
    folder = f"evaluation/{images.name}-val/bnps-000012"
    text = Path(client.download_artifacts(summary.run_id, f"{folder}/predictions.csv")).read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == found["n"] == 15
    assert sum(row["label"] == row["predicted"] for row in rows) / 15 == found["top1"]
    assert {row["path"].partition("/")[0] for row in rows} == {"red", "green", "blue"}
    assert (
        json.loads(Path(client.download_artifacts(summary.run_id, f"{folder}/summary.json")).read_text())["images"]
        == 15
    )
    assert found["classes"].keys() == {"red", "green", "blue"}


@pytest.mark.long
def test_test_images_stand_beside_the_runs_own(client: MlflowClient, shufflenet: Invoke, tmp_path: Path) -> None:
    """Both are named after the folders that were typed, and are bars in the UI: points without steps."""
    for seed, part in enumerate(("train", "val", "test")):
        write_images(tmp_path / "set" / part, per_class=12 if part == "train" else 5, seed=seed)
    run_id = run(tmp_path / "set").run_id
    for part in ("val", "test", "test", "val"):
        result = shufflenet("eval", run_id, "--val-dir", tmp_path / "set" / part)
        assert result.exit_code == 0, result.output
    names = {
        name for name in client.get_run(run_id).data.metrics if name.startswith("eval/") and name.endswith("/top1")
    }
    assert names == {"eval/set-val/top1", "eval/set-test/top1"}
    assert [[point.step for point in client.get_metric_history(run_id, name)] for name in names] == [[0], [0]]


def test_evaluating_twice_adds_no_points(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    summary = run(images)
    for _ in range(2):
        evaluate(shufflenet, summary.run_id)
    names = [name for name in client.get_run(summary.run_id).data.metrics if name.startswith("eval/")]
    assert len(names) == 7
    for name in names:
        if "images_per_second" not in name:
            assert len(client.get_metric_history(summary.run_id, name)) == 1
    # The run's own validations are as they were.
    assert [point.step for point in client.get_metric_history(summary.run_id, "val/top1")] == [4, 8, 12]


@pytest.mark.long
def test_default_destination(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    summary = run(images)
    assert evaluate(shufflenet, summary.result.checkpoint)["logged_to"] is None  # a file
    assert evaluate(shufflenet, summary.run_id, "--log-to", "none")["logged_to"] is None
    assert evaluate(shufflenet, f"runs:/{summary.run_id}@5")["logged_to"] == summary.run_id
    assert evaluate(shufflenet, summary.result.checkpoint, "--log-to", "source")["logged_to"] == summary.run_id
    evaluated = evaluate(shufflenet, summary.run_id, "--log-to", "new", "--run-name", "mine", "--experiment", "other")
    logged_run = client.get_run(evaluated["logged_to"])
    assert logged_run.info.run_name == "mine"
    assert client.get_experiment(logged_run.info.experiment_id).name == "other"
    assert logged_run.data.tags["evaluated.run"] == summary.run_id
    [dataset] = logged_run.inputs.dataset_inputs
    assert dataset.dataset.digest == list_images(images / "val").content_digest


@pytest.mark.long
def test_other_images_of_the_same_name(client: MlflowClient, images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    """Neither replaces the other."""
    summary = run(images)
    for part, seed in (("a", 5), ("b", 6)):
        write_images(tmp_path / part / "photos", per_class=2, seed=seed)
        evaluate(shufflenet, summary.run_id, "--val-dir", tmp_path / part / "photos")
    folders = [entry.path for entry in client.list_artifacts(summary.run_id, "evaluation")]
    assert len(folders) == 2
    assert set(folders) == {"evaluation/photos", "evaluation/b-photos"}
    assert "eval/b-photos/top1" in client.get_run(summary.run_id).data.metrics
    for number in (2, 3):  # images are added to a folder that has been evaluated
        shutil.rmtree(tmp_path / "a" / "photos")
        write_images(tmp_path / "a" / "photos", per_class=2 + number, seed=5)
        evaluate(shufflenet, summary.run_id, "--val-dir", tmp_path / "a" / "photos")
        assert f"eval/photos-{number}/top1" in client.get_run(summary.run_id).data.metrics


def test_names_that_are_no_text(client: MlflowClient, images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    """Names of a file and of a class; the figures show both."""
    for part in ("train", "val"):
        shutil.copytree(images / part, tmp_path / part)
        (tmp_path / part / "red" / "000.png").rename(tmp_path / part / "red" / os.fsdecode(b"\xff.png"))
        (tmp_path / part / "red").rename(tmp_path / part / os.fsdecode(b"r\xffd\n"))
    summary = run(tmp_path)
    found = evaluate(shufflenet, summary.run_id)
    assert (found["n"], found["logged_to"]) == (15, summary.run_id)


def test_outputs_without_a_class_have_labels_of_their_own() -> None:
    names = dict(enumerate(("0", "10", "x")))
    labels = label_outputs(names, 12)
    assert len(set(labels)) == 12
    assert labels[:3] == ["0", "10", "x"]
    assert labels[10] == "output 10"
    assert labels[11] == "11"


def test_json_of_what_is_no_number() -> None:
    assert json.loads(to_json({"a": [float("nan"), (1.5, float("inf"))]})) == {"a": [None, [1.5, None]]}


def test_below_mlflow_run_a_result_is_printed_too(
    client: MlflowClient, images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(images)
    wrapper_run_id = client.create_run(client.create_experiment("made")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper_run_id)

    def fail(*_: object, **__: object) -> None:
        raise TrackingError("cannot log metrics: connection refused")

    monkeypatch.setattr(evaluation, "record_in_own", fail)
    result = shufflenet("eval", summary.run_id, "--json")
    assert (result.exit_code, json.loads(result.stdout)["n"]) == (1, 15)
    assert client.get_run(wrapper_run_id).info.status == "FAILED"


def test_a_file_without_a_run_cannot_go_to_it(
    images: Path, shufflenet: Invoke, tmp_path: Path, empty_database: Path
) -> None:
    summary = run(images)
    shutil.copy(empty_database, tmp_path / "another.db")
    store = f"sqlite:///{tmp_path}/another.db"
    result = shufflenet("eval", summary.result.checkpoint, "--log-to", "source", "--tracking-uri", store)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "belongs to no run in" in result.output
    assert "--log-to new makes one" in result.output
    found = evaluate(shufflenet, summary.result.checkpoint, "--log-to", "new", "--tracking-uri", store)
    assert found["logged_to"]


def test_results_survive_an_outage_of_the_store(
    images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(images)

    def fail(*_: object) -> None:
        raise TrackingError("cannot log metrics: connection refused")

    monkeypatch.setattr(evaluation, "record_in_source", fail)
    result = shufflenet("eval", summary.run_id, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["top1"] == summary.result.val_top1
    assert "Error: cannot log metrics: connection refused" in result.stderr
