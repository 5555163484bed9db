"""Accuracies stand beside what always answering with the largest class would give, and are not the last word."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from rich.cells import cell_len
from torch import Tensor, nn

from shufflenet_mlflow import create_model
from shufflenet_mlflow.cli.confusion import MOST_CLASSES, confusion_lines
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.loader import BadImageLog
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.evaluation.evaluate import EvalResult, EvalSettings, evaluate
from shufflenet_mlflow.evaluation.report import Observer, Outcomes, Report
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from tests.support.command_line import Invoke, small_options
from tests.support.effort import only_in_full_run
from tests.support.images import write_images
from tests.support.metrics import steps

MODEL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 8 blue, 3 green and 1 red images."""
    folder = write_images(tmp_path_factory.mktemp("uneven"), per_class=8)
    for number in range(8):
        if number >= 3:
            (folder / "green" / f"{number:03}.png").unlink()
        if number >= 1:
            (folder / "red" / f"{number:03}.png").unlink()
    return folder


class Answers(nn.Module):
    """A network that answers `first`, and then `rest`, each time with the same certainty."""

    def __init__(self, first: int, rest: int) -> None:
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 3)
        logits[0, self.first] = 9.0
        logits[1:, self.rest] = 9.0
        return logits


def evaluated(folder: Path, network: nn.Module) -> tuple[EvalResult, Report]:
    listing = list_images(folder)
    observer = Observer(listing)
    result = evaluate(
        network,
        listing,
        Preprocess("bgr255", 32),
        EvalSettings(batch_size=12, workers=0, device=torch.device("cpu")),
        bad_images=BadImageLog(skip=False),
        context=JobContext.alone(LoggingReporter(), StopFlag()),
        observe=observer,
    )
    return result, Report(observer.outcomes(), listing.classes)


def test_the_figures_of_an_uneven_set(uneven: Path) -> None:
    result, report = evaluated(uneven, Answers(first=0, rest=1))  # one blue image and the three green ones are right
    assert (result.top1, result.majority) == (4 / 12, 8 / 12)
    assert result.mean_class_accuracy == pytest.approx((1 / 8 + 1 + 0) / 3)
    assert (report.accuracy, report.majority) == (result.top1, result.majority)
    assert report.mean_class_accuracy == pytest.approx(result.mean_class_accuracy)
    assert result.only_answer is None


def test_one_answer_for_every_image_is_noticed(uneven: Path, tmp_path: Path) -> None:
    assert evaluated(uneven, Answers(1, 1))[0].only_answer == 1
    alone = write_images(tmp_path / "alone", classes=("blue",))
    assert evaluated(alone, Answers(0, 0))[0].only_answer is None  # nothing else was to be answered


def biased(path: Path) -> Path:
    """Write weights that take every image for the first class, and would need long to forget it."""
    torch.manual_seed(0)
    model = create_model(MODEL, num_classes=3)
    with torch.no_grad():
        model.classifier[0].weight.zero_()
        weights = model.state_dict()
        weights["classifier.0.weight"][0] = 1000.0
    torch.save({"state_dict": weights}, path)
    return path


def test_train_and_eval_show_the_baseline_and_the_only_answer(
    images: Path, shufflenet: Invoke, client: MlflowClient, tmp_path: Path
) -> None:
    weights = ("--init-from", biased(tmp_path / "biased.pth.tar"), "--model", MODEL, "--lr", 1e-9)
    trained = shufflenet("train", *small_options(images), *weights)
    assert trained.exit_code == 0, trained.output
    assert "validation at iteration 4: top1 0.3333 (majority 0.3333)  mean class 0.3333  loss" in trained.stderr
    assert "top5" not in trained.stderr
    warnings = [line for line in trained.stderr.splitlines() if "takes every image for 'blue'" in line]
    assert [line.rpartition(": ")[2].split()[0] for line in warnings] == ["normal", "the"]  # the first and the last
    assert "validation accuracy  0.3333 (majority 0.3333)" in trained.stdout
    assert "mean class accuracy  0.3333" in trained.stdout
    run_id = trained.stdout.split()[2]
    metrics = client.get_run(run_id).data.metrics
    assert (metrics["val/majority"], metrics["val/mean_class_accuracy"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert steps(client, run_id, "val/majority") == steps(client, run_id, "val/mean_class_accuracy") == [4, 8, 12]
    assert "0.3333 (majority 0.3333)" in client.get_run(run_id).data.tags["mlflow.note.content"]
    shown = shufflenet("eval", run_id, "--log-to", "new")
    assert "top1        0.3333 (majority 0.3333)" in shown.stdout
    assert "mean class  0.3333" in shown.stdout
    assert "Warning: every image is taken for 'blue'" in shown.stderr
    assert "top5" not in shown.output
    logged_to = shown.stdout.split("logged to   run ")[1].split()[0]
    own = client.get_run(logged_to).data
    assert own.metrics["val/majority"] == pytest.approx(1 / 3)
    assert "0.3333 (majority 0.3333) on 15 images" in own.tags["mlflow.note.content"]


@only_in_full_run
@pytest.mark.long
def test_documents_have_the_figures(
    small_train: Callable[..., dict[str, Any]], shufflenet: Invoke, client: MlflowClient
) -> None:
    trained = small_train()
    metrics = client.get_run(trained["run_id"]).data.metrics
    assert trained["val_majority"] == metrics["val/majority"] == pytest.approx(1 / 3)
    assert trained["val_mean_class_accuracy"] == metrics["val/mean_class_accuracy"]
    assert trained["best_val_top1"] == metrics["best/val_top1"]
    document = json.loads(shufflenet("eval", f"{trained['run_id']}@latest", "--json").stdout)
    assert document["majority"] == pytest.approx(1 / 3)
    assert document["mean_class_accuracy"] == pytest.approx(trained["val_mean_class_accuracy"])
    assert client.get_run(trained["run_id"]).data.metrics["eval/images0-val/majority"] == pytest.approx(1 / 3)
    again = json.loads(shufflenet("train", "--resume", trained["run_id"], "--json").stdout)  # nothing is left to train
    assert {**again, "checkpoint": "", "save_dir": ""} == {**trained, "checkpoint": "", "save_dir": ""}


# ---------------------------------------------------------------- a run ID alone


@pytest.fixture
def run_id(small_train: Callable[..., dict[str, Any]], client: MlflowClient) -> str:
    """Train a run whose best checkpoint, after 5 iterations, is not its latest, after 12."""
    run_id = str(small_train()["run_id"])
    manifest = Path(download_artifacts(f"runs:/{run_id}/checkpoints/checkpoint-000005.pth.tar.json"))
    client.set_tag(run_id, "checkpoint.best", manifest.read_text())
    return run_id


@pytest.mark.long
def test_a_run_id_alone_means_the_best_checkpoint(
    run_id: str, shufflenet: Invoke, images: Path, tmp_path: Path
) -> None:
    def iters(*arguments: object) -> int:
        result = shufflenet(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return int(json.loads(result.stdout)["iters"])

    for ref, expected in (
        *((run_id, 5), (run_id[:12], 5), (f"runs:/{run_id}", 5), (f"{run_id}@best", 5)),
        *((f"{run_id}@latest", 12), (f"runs:/{run_id}@10", 10)),
    ):
        assert iters("eval", ref) == expected, ref
        assert iters("export", ref, "--output", tmp_path / "exported.pt2") == expected, ref
    assert iters("checkpoints", "pull", run_id, "--output", tmp_path) == 12
    promoted = json.loads(shufflenet("checkpoints", "promote", run_id, "--name", "net", "--json").stdout)
    assert promoted["checkpoint"] == "checkpoint-000005.pth.tar"
    picture = images / "val" / "red" / "000.png"
    rows = [
        json.loads(shufflenet("predict", ref, picture, "--json").stdout)
        for ref in (run_id, f"{run_id}@best", f"{run_id}@latest")
    ]
    assert rows[0] == rows[1] != rows[2]
    resumed = shufflenet("train", "--resume", run_id, "--total-iters", 12)
    assert "continuing run" in resumed.stderr and "from iteration 12" in resumed.stderr


def test_a_run_that_was_never_validated_gives_its_latest_and_says_so(
    run_id: str, shufflenet: Invoke, client: MlflowClient
) -> None:
    client.delete_tag(run_id, "checkpoint.best")
    result = shufflenet("eval", run_id)
    assert (
        f"run {run_id} has no best checkpoint, so its latest is taken: bnps-checkpoint-000012.pth.tar" in result.stderr
    )
    assert "iteration 12" in result.stdout


def test_the_best_checkpoint_that_does_not_verify_is_named_and_passed_over(
    run_id: str, shufflenet: Invoke, client: MlflowClient, tmp_path: Path
) -> None:
    folder = client.get_run(run_id).info.artifact_uri.removeprefix("file://")
    (Path(folder) / "checkpoints" / "checkpoint-000005.pth.tar").write_bytes(b"nothing")
    result = shufflenet("eval", run_id, "--cache-dir", tmp_path)
    assert "Warning: skipped: " in result.stderr and "checkpoint-000005.pth.tar" in result.stderr
    assert "iteration 12" in result.stdout


def test_train_says_which_checkpoint_the_run_id_means(shufflenet: Invoke, images: Path, tmp_path: Path) -> None:
    weights = ("--init-from", biased(tmp_path / "biased.pth.tar"), "--model", MODEL, "--lr", 1e-9)
    trained = shufflenet("train", *small_options(images), *weights)
    run_id = trained.stdout.split()[2]
    line = "best checkpoint      iteration 4, accuracy 0.3333; the run ID alone means it, "
    assert f"{line}{run_id[:12]}@latest the last one" in trained.stdout
    assert "iteration 4" in shufflenet("eval", run_id).stdout


# ---------------------------------------------------------------- the confusion table


def report_of(names: list[str], images: int, seed: int = 0) -> Report:
    rng = np.random.default_rng(seed)
    labels_N, predicted_N = rng.integers(0, len(names), (2, images))
    ones_N = np.ones(images)
    return Report(Outcomes(("x",) * images, labels_N, predicted_N, ones_N, ones_N), tuple(names))


@pytest.mark.long
def test_eval_prints_the_confusions_that_it_logs(
    small_train: Callable[..., dict[str, Any]], shufflenet: Invoke, client: MlflowClient
) -> None:
    run_id = small_train()["run_id"]
    lines = shufflenet("eval", run_id).stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if "true \\ answered" in line)
    assert lines[first].split() == ["true", "\\", "answered", "1", "2", "3"]
    shown = [line.split() for line in lines[first + 1 : first + 4]]
    table = {
        (row[1], column): 0 if count == "·" else int(count) for row in shown for column, count in enumerate(row[2:])
    }
    (predictions,) = Path(download_artifacts(f"runs:/{run_id}/evaluation")).rglob("predictions.csv")
    names = ("blue", "green", "red")
    rows = list(csv.DictReader(predictions.read_text().splitlines()))
    counted = Counter((row["label"], names.index(row["predicted"])) for row in rows)
    assert {pair: count for pair, count in table.items() if count} == counted
    assert sum(table.values()) == 15


@pytest.mark.parametrize("images", [60, 5_000, 9_000_000])
@pytest.mark.parametrize("classes", [2, 12, MOST_CLASSES])
def test_the_table_fits_the_terminal(classes: int, images: int) -> None:
    names = [f"種類 {number} \x1b[31m of a name that is much too long" for number in range(classes)]
    report = report_of(names, images)
    lines = confusion_lines(report, 80)
    assert max(map(cell_len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    rows = [
        [int(word) if word != "·" else 0 for word in line.split()[-len(lines[0].split()[3:]) :]] for line in lines[1:]
    ]
    shown = [int(line.split()[0]) - 1 for line in lines[1:]]
    assert [sum(row) for row in rows] == [int(report.confusion_CC[label].sum()) for label in shown]
    whole = confusion_lines(report, None)
    assert len(whole) == classes + 1
    assert "other" not in whole[0]


def test_no_table_for_many_classes_or_one() -> None:
    assert confusion_lines(report_of([str(number) for number in range(MOST_CLASSES + 1)], 100), 80) == []
    assert confusion_lines(report_of(["only"], 100), 80) == []
