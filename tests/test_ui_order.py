"""How runs are written so that MLflow's UI shows what matters first."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from mlflow import MlflowClient

from shufflenet_mlflow.data.datasets import evaluation_names
from shufflenet_mlflow.evaluation.plots import classes_figure, mistakes_figure
from shufflenet_mlflow.evaluation.report import Outcomes, Report
from shufflenet_mlflow.tracking.provenance import command_name
from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images
from tests.support.training import run, run_until

PARTS = ("val/", "macs", "train/", "best/")
"""In the order in which a run that is validated before its first progress line gets them."""


def logged_first(client: MlflowClient, run_id: str) -> list[str]:
    """Return metrics in the order in which the run got them, as the UI's pages list them."""
    return list(client.get_run(run_id).data.metrics)


def test_results_are_logged_before_costs(client: MlflowClient, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before samples of the machine, which is sampled while the first iterations run."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    run_id = str(run(images, "--display-interval", 6, "--no-system-metrics", "false").run_id)
    names = logged_first(client, run_id)
    first_of = {part: next(place for place, name in enumerate(names) if name.startswith(part)) for part in PARTS}
    assert sorted(PARTS, key=first_of.__getitem__) == list(PARTS)
    assert all(not name.startswith("system/") or first_of["macs"] < names.index(name) for name in names)
    assert not any(name.startswith(("model/", "best/iters")) for name in names)
    for name in ("macs", "parameters", "best/val_top1"):
        assert [point.step for point in client.get_metric_history(run_id, name)] == [0]


def test_nothing_left_to_do_changes_no_end(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    first = shufflenet("train", *small_options(images), "--save-dir", "models")
    assert first.exit_code == 0, first.output
    [before] = client.search_runs([client.get_experiment_by_name("shufflenet").experiment_id])
    again = shufflenet("train", *small_options(images), "--save-dir", "models", "--keep-last", 5)
    assert "nothing is left to train" in again.stderr, again.output
    after = client.get_run(before.info.run_id)
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time)
    changed = {name for name in before.data.tags.keys() | after.data.tags.keys() if name != "writer"}
    assert {name: before.data.tags.get(name) for name in changed} == {
        name: after.data.tags.get(name) for name in changed
    }
    assert after.data.metrics == before.data.metrics


def test_a_run_that_did_not_end_gets_its_end(client: MlflowClient, images: Path) -> None:
    """Nothing is left to train either, but MLflow does not know."""
    run_id = str(run(images).run_id)
    client.update_run(run_id, status="RUNNING")
    assert run(images, "--resume", run_id).was_complete
    assert client.get_run(run_id).info.status == "FINISHED"
    stopped = run_until(images, "training", 5)
    assert client.get_run(str(stopped.run_id)).info.status == "KILLED"
    assert run(images, "--resume", stopped.run_id).result.iters == 12
    assert client.get_run(str(stopped.run_id)).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/shufflenet", "train", "--lr", "0.1"], "shufflenet train"),
        (["/x/shufflenet_mlflow/__main__.py", "eval", "0123"], "shufflenet eval"),
        (["/x/my train.py", "--data", "a b"], "my train.py"),
        (["fit.py", "/data/a/b"], "fit.py"),
    ],
)
def test_source(words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The UI shows what follows the last slash."""
    monkeypatch.setattr(sys, "argv", words)
    assert command_name() == expected


@pytest.mark.parametrize(
    ("directory", "part", "expected"),
    [
        (None, None, ["digits"]),
        ("/data/pets/test", None, ["pets-test", "data-pets-test"]),
        ("/data/pets/Val", None, ["pets-Val", "data-pets-Val"]),
        ("/data/pets", None, ["pets", "data-pets"]),
        ("/data/pets", "val", ["pets-val", "data-pets-val"]),
        ("/data/pets.csv", "test", ["pets-test", "data-pets-test"]),
        ("/val", None, ["val"]),
        ("/", None, ["digits"]),
    ],
)
def test_names_of_evaluations(directory: str | None, part: str | None, expected: list[str]) -> None:
    assert evaluation_names(directory, part) == expected


def test_a_folder_is_named_the_same_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets" / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pets")
    assert evaluation_names("test")[0] == evaluation_names(".//test/")[0] == "pets-test"


# ---------------------------------------------------------------- figures


def texts(figure: object) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]  # type: ignore[attr-defined]


def test_figures_name_files_and_counts(tmp_path: Path) -> None:
    root = write_images(tmp_path / "pets", ("cat", "dog"), 3)
    paths = tuple(f"{label}/{path.name}" for label in ("cat", "dog") for path in sorted((root / label).iterdir()))
    long = f"dog/{'x' * 40}$1.png"
    (root / paths[-1]).rename(root / long)
    outcomes = Outcomes(
        (*paths[:-1], long),
        *(np.array(column) for column in ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0.9] * 6, [0.5] * 6)),
    )
    report = Report(outcomes, ("cat", "dog"))
    shown = texts(mistakes_figure(report, root))
    assert paths[2] in shown
    [shortened] = [text for text in shown if text.startswith("…")]
    assert shortened.endswith(r"xxx\$1.png")
    assert texts(classes_figure(report)).count("2 of 3") == 2
