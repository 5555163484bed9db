"""Files that version 0.1.0 wrote: checkpoints, a store with a run and a logged model, and a journal to deliver."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from shufflenet_mlflow import create_model, get_latest_model, load_checkpoint
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.config import command_of
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.loader import ImageDataset
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.data.reading import Reading
from tests.support.command_line import Invoke
from tests.support.metrics import steps

ARCHIVE = Path(__file__).parent / "fixtures" / "version_0_1_0.tar.xz"
MODEL = "models:/old@champion"
OFFLINE = Path("models/offline")
IMAGE = "images/val/blue/000.png"
DATA = ("--train-dir", "images/train", "--val-dir", "images/val")
"""Configurations name the folder in which they were made; resuming may name another."""


def schema_version(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        [(version,)] = connection.execute("SELECT version_num FROM alembic_version")
        return str(version)


def move_store(database: Path, old: str, new: str) -> None:
    """Replace a folder's name in every text of a store."""
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    connection.execute(
                        f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)",
                        (old, new, old),
                    )


def weights(checkpoint: str | Path | None) -> torch.Tensor:
    assert checkpoint is not None
    return torch.cat([tensor.flatten().double() for tensor in read_checkpoint(checkpoint)["state_dict"].values()])


@pytest.fixture
def recorded(workplace: Path, empty_database: Path) -> dict[str, Any]:
    """Unpack the files into the working directory, and return what version 0.1.0 answered about them."""
    with tarfile.open(ARCHIVE) as archive:
        # Python 3.10.0 to 3.10.11, and 3.11.0 to 3.11.3, know no filters.
        archive.extractall(workplace, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    document: dict[str, Any] = json.loads((workplace / "fixture.json").read_text())
    database = workplace / "mlflow.db"
    move_store(database, document["root"], str(workplace))
    if schema_version(database) != schema_version(empty_database):  # by another version of MLflow
        upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{database}"]
        upgraded = subprocess.run(upgrade, check=False, capture_output=True, text=True)
        if "Can't locate revision" in upgraded.stderr:
            pytest.skip("this MLflow is older than the one that version 0.1.0 was recorded with")
        assert upgraded.returncode == 0, upgraded.stderr
    return {**document, "first": weights("models/stopped/checkpoint-000001.pth.tar")}


def answer(shufflenet: Invoke, *words: object) -> Any:
    """Return what a command prints with `--json`."""
    result = shufflenet(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def on_the_same_machine(environment: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """Whether another version of this project is all that two environments may differ in."""
    names = recorded["environment"].keys() - {"shufflenet-mlflow"}
    return all(environment.get(name) == recorded["environment"][name] for name in names)


def digest(payload: dict[str, Any]) -> str:
    """Return the SHA-256 of the state that training has reached."""
    sha256 = hashlib.sha256()

    def update(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                sha256.update(str(key).encode())
                update(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                update(item)
        elif isinstance(value, torch.Tensor):
            sha256.update(value.contiguous().numpy().tobytes())
        else:
            sha256.update(repr(value).encode())

    # Without what version 0.1.0 did not compute.
    metrics = {key: payload["metrics"][key] for key in ("val/loss", "val/top1", "val/top5", "validated_iters")}
    update({**{key: payload[key] for key in ("state_dict", "optimizer_state_dict")}, "metrics": metrics})
    update({key: payload[key] for key in ("best", "loss")})
    return sha256.hexdigest()


def check_end(summary: dict[str, Any], recorded: dict[str, Any], shufflenet: Invoke) -> None:
    """Check that a resumed run has ended as the undisturbed one did.

    The recorded bits are those of one kind of processor. Others show by their first iteration that they round
    differently, by little; after a few more, such differences have grown to anything.
    """
    assert summary["iters"] == 4
    assert summary["pending"] == 0
    assert MlflowClient().get_run(summary["run_id"]).info.status == "FINISHED"
    assert steps(MlflowClient(), summary["run_id"], "train/loss") == [1, 2, 3, 4]
    payload = read_checkpoint(summary["checkpoint"])
    if not on_the_same_machine(payload["environment"], recorded):
        return
    config = {name: value for name, value in payload["config"].items() if name not in ("train_dir", "val_dir")}
    words = (*command_of({**config, "save_interval": 1}), *DATA, "--no-log-models", "--save-dir", "again")
    answer(shufflenet, "train", *words)
    first, then = weights("again/checkpoint-000001.pth.tar"), recorded["first"]
    torch.testing.assert_close(first, then, rtol=0.01, atol=0.005)
    if torch.equal(first, then):
        assert digest(payload) == recorded["uninterrupted"]


@pytest.mark.parametrize("folder", ["models/stopped", "models/offline"])
def test_the_checkpoint_loads(folder: str, recorded: dict[str, Any]) -> None:
    path, iters = get_latest_model(folder)
    assert path is not None
    assert iters == 1
    assert verify_checkpoint(path) is None
    assert load_checkpoint(create_model("shufflenet_v2_x0_5", 3), path).is_complete


def test_eval_answers_the_same(recorded: dict[str, Any], shufflenet: Invoke) -> None:
    found = answer(shufflenet, "eval", recorded["run_id"], *DATA[2:])
    expected = recorded["eval"]
    assert {key: found[key] for key in ("top1", "n")} == {key: expected[key] for key in ("top1", "n")}
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)  # after one iteration it is large


def pixels(folder: Path, preprocess: Preprocess) -> list[torch.Tensor]:
    """Return what a network gets of each image; nothing of an unreadable one."""
    dataset = ImageDataset(list_images(folder), eval_transform(preprocess), replace_bad=False)
    items = [dataset[0, index].image_CHW for index in range(len(dataset))]
    return [torch.empty(0) if item is None else item for item in items]


def write_odd_pictures(folder: Path) -> None:
    """Replace the first images of a folder by those that are read otherwise since."""
    blue, green, red = (np.array(Image.open(folder / name / "000.png")) for name in ("blue", "green", "red"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(blue).save(folder / "blue" / "000.png", exif=exif)
    alpha = np.random.default_rng(0).integers(0, 256, green.shape[:2], dtype=np.uint8)
    Image.fromarray(np.dstack([green, alpha])).save(folder / "green" / "000.png")
    Image.fromarray(red[:, :, 0].astype(np.float32) * 2).save(folder / "red" / "000.png", "TIFF")
    Image.fromarray(red).resize((1600, 1200)).save(folder / "red" / "001.png", "JPEG", exif=exif)


def test_pictures_are_read_as_they_were(recorded: dict[str, Any], shufflenet: Invoke) -> None:
    """Pixels are those of Pillow's plain conversion, with nothing turned, laid over white, scaled or shrunk."""
    odd, plain = Path("odd"), Path("plain")
    shutil.copytree("images/val", odd)
    write_odd_pictures(odd)
    shutil.copytree(odd, plain)
    for path in plain.glob("*/00[01].png"):
        with Image.open(path) as image:
            image.convert("RGB").save(path, "PNG", exif=b"")
    found, expected = (answer(shufflenet, "eval", recorded["run_id"], "--val-dir", folder) for folder in (odd, plain))
    assert found["loss"] == expected["loss"]
    payload = read_checkpoint(get_latest_model(OFFLINE)[0])
    preprocess = Preprocess.from_dict(payload["preprocess"])
    as_then, as_now = (
        [pixels(folder, value) for folder in (odd, plain)]
        for value in (preprocess, replace(preprocess, reading=Reading()))
    )
    assert all(map(torch.equal, *as_then))
    assert [torch.equal(*pair) for pair in zip(*as_now, strict=True)].count(False) == 4


def test_the_run_resumes_as_it_began(recorded: dict[str, Any], shufflenet: Invoke) -> None:
    """Without images of formats that it left out, and reading the others as before."""
    with Image.open(IMAGE) as image:
        image.save("images/train/red/left out.gif")
        image.save("images/val/red/left out.jfif", "JPEG")
    summary = answer(shufflenet, "train", "--resume", recorded["run_id"], *DATA, "--no-log-models")
    Path("images/train/red/left out.gif").unlink()
    Path("images/val/red/left out.jfif").unlink()
    check_end(summary, recorded, shufflenet)
    preprocess = read_checkpoint(summary["checkpoint"])["preprocess"]
    assert [preprocess[name] for name in ("orientation", "transparency", "range", "decoding")] == [
        "stored",
        "dropped",
        "clipped",
        "full",
    ]


def test_predict_answers_the_same(recorded: dict[str, Any], shufflenet: Invoke) -> None:
    [found] = answer(shufflenet, "predict", MODEL, IMAGE)
    expected = recorded["predict"]
    assert found["label"] == expected["label"]
    assert [entry["label"] for entry in found["top"]] == [entry["label"] for entry in expected["top"]]
    assert [entry["probability"] for entry in found["top"]] == pytest.approx(
        [entry["probability"] for entry in expected["top"]]
    )


def test_the_logged_model_answers_the_same(recorded: dict[str, Any]) -> None:
    model = mlflow.pyfunc.load_model(MODEL)
    found = model.predict(pd.DataFrame({"image": [Path(IMAGE).read_bytes()]}))
    assert list(found["label"]) == [recorded["predict"]["label"]]
    np.testing.assert_allclose(found["probability"], [recorded["predict"]["probability"]])


def test_the_run_resumes(recorded: dict[str, Any], shufflenet: Invoke) -> None:
    summary = answer(shufflenet, "train", "--resume", recorded["run_id"], *DATA, "--no-log-models")
    assert summary["run_id"] == recorded["run_id"]
    check_end(summary, recorded, shufflenet)


def test_the_run_resumes_in_another_folder(recorded: dict[str, Any], shufflenet: Invoke) -> None:
    """Nothing but the store remains of the machine on which it was stopped."""
    shutil.rmtree("models")
    check_end(
        answer(shufflenet, "train", "--resume", recorded["run_id"], *DATA, "--save-dir", "elsewhere"),
        recorded,
        shufflenet,
    )


def only_other_run(recorded: dict[str, Any]) -> str:
    """Return the ID of the store's one run besides the recorded one."""
    runs = MlflowClient().search_runs([item.experiment_id for item in MlflowClient().search_experiments()])
    [run_id] = [run.info.run_id for run in runs if run.info.run_id != recorded["run_id"]]
    return str(run_id)


def test_the_journal_is_delivered_once(workplace: Path, recorded: dict[str, Any], shufflenet: Invoke) -> None:
    store = ("--tracking-uri", f"sqlite:///{workplace}/mlflow.db")
    first = answer(shufflenet, "sync", OFFLINE, *store)
    assert (first["run_id"], first["pending"]) == (only_other_run(recorded), 0)
    assert first["sent"] > 0
    second = answer(shufflenet, "sync", OFFLINE, *store)
    assert (second["run_id"], second["sent"], second["pending"]) == (first["run_id"], 0, 0)
    client = MlflowClient()
    run = client.get_run(only_other_run(recorded))
    assert (run.info.run_name, run.info.status) == ("offline", "KILLED")
    for name in ("train/loss", "train/lr", "loss", "epoch"):
        assert steps(client, run.info.run_id, name) == [1], name
    assert run.data.params["total_iters"] == "4"
    assert len(run.inputs.dataset_inputs) == 2
    assert {"config.json", "classes.json"} <= {item.path for item in client.list_artifacts(run.info.run_id)}
    assert json.loads(run.data.tags["checkpoint.latest"])["iters"] == 1
    assert verify_checkpoint(get_latest_model(run.info.run_id)[0]) is None


def test_the_offline_run_resumes(workplace: Path, recorded: dict[str, Any], shufflenet: Invoke) -> None:
    store = ("--tracking-uri", f"sqlite:///{workplace}/mlflow.db")
    summary = answer(shufflenet, "train", "--resume", OFFLINE, *DATA, *store, "--no-log-models")
    assert summary["run_id"] == only_other_run(recorded)
    check_end(summary, recorded, shufflenet)
