"""One run on each kind of store: trained, stopped, resumed, evaluated, compared, promoted, pruned.

The embedded store is fast; `mlflow server` with SQLite, and PostgreSQL with S3, are marked long.
"""

import base64
import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import Result
from mlflow import MlflowClient, pyfunc
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from PIL import Image

from shufflenet_mlflow import get_latest_model
from shufflenet_mlflow.export.logged import find_logged_model
from shufflenet_mlflow.tracking.target import manifest_in_tag
from tests.support.backing_stores import BUCKET, S3, Postgres, why_no_backing_stores
from tests.support.effort import only_in_full_run
from tests.support.metrics import steps
from tests.support.mlflow_server import Server
from tests.support.training import run, run_until

Invoke = Callable[..., Result]

STORES = [
    "embedded",
    pytest.param("server", marks=[pytest.mark.long, only_in_full_run]),
    pytest.param(
        "postgres-s3",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(why_no_backing_stores() is not None, reason=str(why_no_backing_stores())),
        ],
    ),
]


@pytest.fixture(params=STORES)
def store(
    request: pytest.FixtureRequest,
    workplace: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Return the tracking URI of a store, which is also set in the environment."""
    if request.param == "embedded":
        yield f"sqlite:///{workplace}/mlflow.db"
        return
    folder = tmp_path_factory.mktemp("store")
    closing: list[Callable[[], object]] = []
    if request.param == "server":
        server = Server(folder)
    else:
        postgres, s3 = Postgres(), S3(folder)
        closing += [postgres.close, s3.close]
        for name, value in s3.env.items():
            monkeypatch.setenv(name, value)
        server = Server(
            folder,
            store=postgres.uri,
            artifacts=("--default-artifact-root", f"s3://{BUCKET}/root", "--no-serve-artifacts"),
            env=s3.env,
        )
    closing.insert(0, server.kill)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server.uri
    for close in closing:
        close()


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


@pytest.fixture
def as_json(shufflenet: Invoke) -> Callable[..., Any]:
    def invoke(*words: object) -> Any:
        result = shufflenet(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


@pytest.mark.timeout(900)
def test_the_whole_way(
    store: str, client: MlflowClient, images: Path, tmp_path: Path, as_json: Callable[..., Any]
) -> None:
    # Trained, stopped by a signal, resumed from the run ID where nothing lies.
    stopped = run_until(images, "training", 7, "--save-dir", tmp_path / "here", by=signal.SIGTERM)
    run_id = stopped.run_id
    assert client.get_run(run_id).info.status == "KILLED"
    ended = run(images, "--resume", run_id, "--save-dir", tmp_path / "there", "--no-log-models", "false")
    assert (ended.run_id, ended.result.iters, ended.pending) == (run_id, 12, 0)
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert steps(client, run_id, "train/loss") == [2, 4, 6, 8, 10, 12]
    assert steps(client, run_id, "val/top1") == [4, 8, 12]
    assert "**Result:** iteration 12 of 12" in stored.data.tags["mlflow.note.content"]

    # Both tags have a logged model, which has the numbers of its checkpoint.
    for tag in ("checkpoint.latest", "checkpoint.best"):
        manifest = manifest_in_tag(stored.data.tags, tag)
        assert manifest is not None
        model = find_logged_model(client, stored, manifest)
        assert model is not None
        found = {metric.key: metric.value for metric in model.metrics}
        assert found["val/top1"] == manifest.val_top1

    # Evaluated, into that run and into one of its own below it.
    evaluated = as_json("eval", run_id)
    assert (evaluated["logged_to"], evaluated["top1"]) == (run_id, ended.result.val_top1)
    evaluation_run_id = as_json("eval", run_id, "--log-to", "new")["logged_to"]
    assert client.get_run(evaluation_run_id).data.tags["mlflow.parentRunId"] == run_id
    section = f"eval/{images.name}-val"
    assert client.get_run(run_id).data.metrics[f"{section}/top1"] == evaluated["top1"]
    assert client.get_run(evaluation_run_id).data.metrics["val/top1"] == evaluated["top1"]
    manifest = manifest_in_tag(stored.data.tags, "checkpoint.latest")
    model = find_logged_model(client, stored, manifest)
    assert f"{section}/top1" in {metric.key for metric in model.metrics}
    figures = {
        entry.path.rpartition("/")[2]
        for entry in client.list_artifacts(run_id, f"figures/{images.name}-val/bnps-000012")
    }
    assert figures == {"confusion.png", "classes.png", "calibration.png", "mistakes.png"}

    # Listed and compared: the two evaluations are of the same network.
    rows = as_json("runs", "--sort", "best/val_top1")
    assert [row["run_id"] for row in rows] == [run_id, evaluation_run_id]
    assert as_json("runs", "show", run_id)["models"]
    compared = as_json("compare", run_id, evaluation_run_id, "--out", tmp_path / "page")
    [test] = compared["paired_tests"]
    assert (test["images"], test["only_first_right"], test["p_value"]) == (15, [], 1.0)
    assert (tmp_path / "page" / "compare.html").stat().st_size > 10_000

    # Promoted, and the same from the registry, for us and for MLflow.
    promoted = as_json("checkpoints", "promote", f"runs:/{run_id}@best", "--name", "pets", "--alias", "champion")
    second = as_json("checkpoints", "promote", f"runs:/{run_id}@best", "--name", "pets", "--alias", "second")
    assert (second["version"], promoted["version"]) == ("1", "1")
    files = sorted((images / "val").rglob("*.png"))[:4]
    predicted = as_json("predict", "models:/pets@champion", *files)
    served = pyfunc.load_model("models:/pets@champion")
    answers = served.predict(pd.DataFrame({"image": [path.read_bytes() for path in files]}))
    assert list(answers["label"]) == [row["label"] for row in predicted]
    assert list(answers["probability"]) == [row["probability"] for row in predicted]

    # Pruned: what is latest, best or promoted stays, and every reference still works.
    dropped = as_json("checkpoints", "prune", run_id, "--keep-last", 1)["dropped"]
    assert dropped
    left = as_json("checkpoints", "ls", run_id)
    assert {row["file"] for row in left}.isdisjoint({item["file"] for item in dropped})
    assert any(row["promoted"] for row in left)
    assert all(verdict["ok"] for verdict in as_json("checkpoints", "verify", run_id))
    path, iters = get_latest_model(run_id)
    assert (path is not None, iters) == (True, 12)


def test_the_shown_command_reproduces_the_run(
    store: str, client: MlflowClient, images: Path, as_json: Callable[..., Any]
) -> None:
    first = run(images, "--lr", "3e-3", "--ema-decay", 0.9)
    words = as_json("runs", "show", first.run_id)["reproduce"]
    assert words[:2] == ["shufflenet", "train"]
    second = as_json(*words[1:], "--no-log-models")
    assert second["run_id"] != first.run_id
    assert (second["loss"], second["val_top1"]) == (first.result.loss, first.result.val_top1)


@pytest.mark.long
def test_a_request_with_several_images(store: str, images: Path, tmp_path: Path, as_json: Callable[..., Any]) -> None:
    """Any number of images, of any size, JPEG or PNG, in one request of MLflow's own format."""
    summary = run(images)
    folder = tmp_path / "exported"
    as_json("export", summary.run_id, "--format", "mlflow", "--output", folder)
    files = sorted((images / "val").rglob("*.png"))
    encoded = [path.read_bytes() for path in files]
    jpeg = io.BytesIO()
    Image.open(files[0]).resize((300, 200)).save(jpeg, "JPEG")
    encoded.append(jpeg.getvalue())
    rows = [[base64.b64encode(content).decode("ascii")] for content in encoded * 5]
    request = {"dataframe_split": {"columns": ["image"], "data": rows}}
    model = pyfunc.load_model(str(folder))
    answers = model.predict(
        infer_and_parse_data({"dataframe_split": request["dataframe_split"]}, model.metadata.get_input_schema())
    )
    assert len(answers) == 5 * (len(files) + 1)
    predicted = as_json("predict", summary.run_id, *files)
    # Another number of images at a time rounds otherwise.
    expected = [row["probability"] for row in predicted]
    assert list(answers["probability"][: len(files)]) == pytest.approx(expected, abs=1e-5)
    assert list(answers["label"][: len(files)]) == [row["label"] for row in predicted]
