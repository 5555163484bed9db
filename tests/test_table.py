"""Tables of images: what a folder can do, a CSV or Parquet file that lists the same images can do."""

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data import table
from shufflenet_mlflow.data.datasets import data_name, list_folder, list_sides
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.table import list_table
from shufflenet_mlflow.errors import DataError
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.training import Reporter

Row = Sequence[str]
SMALL = ("--input-size", 32, "--batch-size", 8, "--total-iters", 4, "--workers", 0, "--no-log-models")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """36 images of three classes in a folder; each test has its own."""
    return write_images(tmp_path / "photos")


def write_csv(path: Path, rows: Sequence[Row], header: Row = ("path", "label")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_below(folder: Path) -> list[tuple[str, str]]:
    return [(path.relative_to(folder).as_posix(), path.parent.name) for path in sorted(folder.glob("*/*"))]


def listed(path: Path, **more: Any) -> ImageListing:
    return list_table(path, option="--train-dir", **more)


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".parquet"])
def test_a_table_of_a_folder_is_the_folder(photos: Path, suffix: str) -> None:
    """Down to the digests, so that a run may continue on either."""
    rows = rows_below(photos)[::-1]
    path = photos / f"pets{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"path": [row[0] for row in rows], "label": [row[1] for row in rows]}), path)
    else:
        write_csv(path, rows)
    found = listed(path)
    path.unlink()
    folder = list_images(photos)
    assert found.classes == folder.classes
    assert list(found.samples) == list(folder.samples)
    assert (found.digest, found.content_digest) == (folder.digest, folder.content_digest)
    assert found.class_digests == folder.class_digests


def test_labels_count_where_folders_do_not_say_them(photos: Path) -> None:
    """The last image of one class becomes the first of the next: paths, sizes and order are the same."""
    rows = [(f"blue/{number:03}.png", "a" if number < 6 else "b") for number in range(12)]
    before = listed(write_csv(photos / "before.csv", rows))
    rows[5] = (rows[5][0], "b")
    after = listed(write_csv(photos / "after.csv", rows))
    assert [sample.path for sample in before.samples] == [sample.path for sample in after.samples]
    assert before.digest != after.digest
    assert before.content_digest != after.content_digest
    assert before.class_digests != after.class_digests


def test_odd_names_and_labels_stay_what_they_are(photos: Path) -> None:
    names = {
        "a b.png": "01",
        'quote ".png': "1",
        "comma, one.png": "1.0",
        "line\nbreak.png": "NA",
        " edges .png": "null",
        "-=formula.png": "=1+1",
        unicodedata.normalize("NFD", "Kätzchen é.png"): unicodedata.normalize("NFD", "Kätzchen"),
        "Kätzchen.png": "Kätzchen",
        "sub/./dir/../x.png": "true",
    }
    (photos / "sub/dir").mkdir(parents=True)
    for name in names:
        shutil.copy(photos / "blue/000.png", photos / name)
    found = listed(write_csv(photos / "odd.csv", list(names.items())))
    by_path = {sample.path: found.classes[sample.label] for sample in found.samples}
    assert by_path == {os.path.normpath(name): unicodedata.normalize("NFC", label) for name, label in names.items()}
    assert len(found.classes) == 8  # one Kätzchen


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_files_are_found_in_either_form_of_unicode(photos: Path, written: Any, stored: Any) -> None:
    shutil.copy(photos / "blue/000.png", photos / unicodedata.normalize(stored, "ärger.png"))
    found = listed(write_csv(photos / "pets.csv", [(unicodedata.normalize(written, "ärger.png"), "a")]))
    assert found.samples[0].path == unicodedata.normalize(stored, "ärger.png")
    assert found.samples[0].bytes > 0


def test_what_spreadsheets_write(photos: Path) -> None:
    """A byte-order mark, CRLF, blank lines, further columns, an image that is listed twice."""
    text = "\ufeffpath,width,label\r\n\r\nblue/000.png,1,a\r\nred/000.png,2,b\r\nred/000.png,2,b\r\n"
    (photos / "pets.csv").write_bytes(text.encode())
    assert [sample.path for sample in listed(photos / "pets.csv").samples] == ["blue/000.png", "red/000.png"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array([7, 10, 7]), ("10", "7")),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b")),
        (pa.array(["01", "1", "01"], pa.large_string()), ("01", "1")),
    ],
)
def test_types_of_parquet(photos: Path, labels: Any, classes: tuple[str, ...]) -> None:
    paths = ["blue/000.png", "red/000.png", "red/001.png"]
    pq.write_table(pa.table({"path": paths, "label": labels, "more": [b"\xff"] * 3}), photos / "pets.parquet")
    assert listed(photos / "pets.parquet").classes == classes


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": ["a"]}, "has no column 'path'; its first row is 'label'"),
        ({"path": ["blue/000.png"], "label": [1.0]}, "the column 'label' is of type double; store it as text"),
        ({"path": ["blue/000.png"], "label": [None]}, "row 1: the label is missing"),
        ({"path": [3], "label": ["a"]}, "the column 'path' is of type int64"),
        ({"path": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "has no row"),
    ],
)
def test_wrong_parquet_files(photos: Path, columns: dict[str, Any], says: str) -> None:
    pq.write_table(pa.table(columns), photos / "pets.parquet")
    with pytest.raises(DataError) as caught:
        listed(photos / "pets.parquet")
    assert says in str(caught.value) and "pets.parquet" in str(caught.value)


def test_parquet_whose_text_is_not_utf_8(photos: Path) -> None:
    binary = pa.array([b"blue/\xff.png"])
    text = pa.Array.from_buffers(pa.string(), 1, binary.buffers())
    pq.write_table(pa.table({"path": text, "label": ["a"]}), photos / "pets.parquet")
    with pytest.raises(DataError, match="is not a Parquet file that can be read"):
        listed(photos / "pets.parquet")


def test_tables_of_absurd_size(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "pets.csv").write_text("path,label\n")
    os.truncate(photos / "pets.csv", 1 << 40)  # takes no room
    with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes, and a table at most 536,870,912"):
        listed(photos / "pets.csv")
    monkeypatch.setattr(table, "MOST_ROWS", 2)
    pq.write_table(pa.table({"path": ["x"] * 3, "label": ["a"] * 3}), photos / "pets.parquet")
    with pytest.raises(DataError, match="has 3 rows, and a table at most 2"):
        listed(photos / "pets.parquet")


def sides_of(train: Path, val: Path | None = None, **more: Any) -> Any:
    asked = {"val_fraction": None, "group_by": None, "seed": 0, "skip_bad": False, "cache_dir": None}
    return list_sides(str(train), None if val is None else str(val), **{**asked, "reporter": Reporter(), **more})


def test_a_column_says_what_is_for_what(photos: Path) -> None:
    words = ("train", "Training", "val", "valid", "dev", "test")
    rows = [(path, label, words[index % 6]) for index, (path, label) in enumerate(rows_below(photos))]
    path = write_csv(photos / "pets.csv", rows, ("path", "label", "split"))
    for sides in (sides_of(path), sides_of(path, path)):
        assert (len(sides.train), len(sides.val), sides.division) == (12, 18, None)
        assert sides.train.table.splits is None  # the workers need no columns
    test = list_folder(str(path), "test", option="x", skip_bad=False, cache_dir=None, reporter=Reporter())
    assert len(test) == 6
    with pytest.raises(DataError, match="has a column 'split', .* leave out --val-fraction and --group-by"):
        sides_of(path, val_fraction=0.2)


def test_a_column_keeps_groups_together(photos: Path) -> None:
    rows = [(path, label, str(index % 7)) for index, (path, label) in enumerate(rows_below(photos))]
    path = write_csv(photos / "pets.csv", rows, ("path", "label", "group"))
    group_of = {row[0]: row[2] for row in rows}
    sides = sides_of(path)
    train, val = ({group_of[sample.path] for sample in side.samples} for side in (sides.train, sides.val))
    assert sides.groups == 7 and train and val and not train & val
    with pytest.raises(DataError, match=r"has a column 'group', and --group-by \(=x\) excludes it"):
        sides_of(path, group_by="x")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("blue/000.png", "a", "train")], "has no row with split val, only with train"),
        ([("blue/000.png", "a", "val")], "has no row with split train, only with val"),
        (
            [("blue/000.png", "a", "train"), ("red/000.png", "b", "train"), ("blue/001.png", "a", "val")],
            "has no row with split val of class 'b'",
        ),
        ([("blue/000.png", "a", "train"), ("blue/000.png", "a", "val")], "has the split 'val', and 'train' in row 2"),
    ],
)
def test_splits_that_do_not_fit(photos: Path, rows: list[Row], says: str) -> None:
    path = write_csv(photos / "pets.csv", rows, ("path", "label", "split"))
    with pytest.raises(DataError) as caught:
        sides_of(path)
    assert says in str(caught.value)


def test_groups_that_a_table_divides_are_named(photos: Path) -> None:
    words = ("train", "val")
    rows = [(path, label, words[index % 2], str(index // 2)) for index, (path, label) in enumerate(rows_below(photos))]
    rows[:2] = [(path, label, split, "") for path, label, split, _ in rows[:2]]
    rows[3:4] = [(*rows[3][:3], "another")]
    reporter = Reporter()
    sides_of(write_csv(photos / "pets.csv", rows, ("path", "label", "split", "group")), reporter=reporter)
    [warning] = reporter.warnings
    assert "has group '10', '11', '12' and 13 more in training and in validation" in warning


def test_a_missing_file_is_an_unreadable_one_where_those_are_skipped(photos: Path) -> None:
    path = write_csv(photos / "pets.csv", [*rows_below(photos), ("gone.png", "red"), ("gone too.png", "red")])
    with pytest.raises(DataError, match=r"row 38: the image 'gone.png' does not exist in .* \(and 1 more file\)"):
        listed(path)
    found = listed(path, skip_missing=True)
    assert [sample.bytes for sample in found.samples if sample.path.startswith("gone")] == [0, 0]


def test_names_of_data_sets() -> None:
    names = [data_name(path) for path in ("x/pets.csv", "x/pets/train.parquet", "x/train", "x/pets", None)]
    assert names == ["pets", "pets", "x", "pets", "digits"]


@pytest.mark.long
def test_a_run_on_a_table(photos: Path, shufflenet: Invoke, client: MlflowClient, tmp_path: Path) -> None:
    """Training, evaluation, prediction and lineage; then the labels change, and the run does not go on."""
    words = ("train", "val", "train", "test", "train", "train")
    rows = [(path, f"0{label}", words[index % 6]) for index, (path, label) in enumerate(rows_below(photos))]
    path = write_csv(photos / "my, pets.csv", rows, ("path", "label", "split"))
    trained = shufflenet("train", "--train-dir", path, *SMALL, "--save-dir", "models", "--json")
    assert trained.exit_code == 0, trained.output
    document = json.loads(trained.stdout)
    payload = read_checkpoint(Path(document["checkpoint"]))
    assert payload["class_to_idx"] == {"0blue": 0, "0green": 1, "0red": 2}
    assert (payload["config"]["val_fraction"], payload["config"]["val_dir"]) == (None, None)
    run = client.get_run(document["run_id"])
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"my, pets"}
    assert {json.loads(entry.dataset.source)["uri"] for entry in run.inputs.dataset_inputs} == {str(path)}

    for more, n in ((), 6), (("--split", "test"), 6), (("--split", "train"), 24), (("--val-dir", path), 6):
        result = shufflenet("eval", document["run_id"], *more, *(("--log-to", "none") if more else ()), "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["n"] == n
        assert "no longer holds" not in result.stderr
    result = shufflenet("predict", "models", path, "--json")
    assert [entry["path"] for entry in json.loads(result.stdout)] == [str(photos / row[0]) for row in rows]
    shutil.copytree(photos, tmp_path / "copy")
    moved = ("--train-dir", tmp_path / "copy" / path.name, "--save-dir", "models")
    assert shufflenet("train", "--resume", "models", *moved).exit_code == 0

    rows[0] = (rows[0][0], "0red", "train")
    write_csv(path, rows, ("path", "label", "split"))
    result = shufflenet("train", "--resume", "models", "--save-dir", "models")
    assert result.exit_code == 1
    assert "pets.csv' does not hold the images that the run began with: 1 files added" in result.stderr


def test_unreadable_images_of_a_table(photos: Path, shufflenet: Invoke) -> None:
    (photos / "red/000.png").write_bytes(b"no image")
    path = write_csv(photos / "pets.csv", rows_below(photos))
    result = shufflenet("train", "--train-dir", path, *SMALL)
    assert result.exit_code == 1
    assert f"{str(photos / 'red/000.png')!r} is not a readable image" in result.stderr
    result = shufflenet("train", "--train-dir", path, *SMALL, "--on-bad-image", "skip")
    assert result.exit_code == 0, result.output
    assert "1 file is not readable, and will be skipped" in result.stderr


def test_prediction_needs_no_labels(photos: Path, shufflenet: Invoke, images: Path) -> None:
    trained = shufflenet("train", "--train-dir", images / "train", *SMALL, "--save-dir", "models")
    assert trained.exit_code == 0, trained.output
    path = write_csv(photos / "todo.csv", [("red/000.png",), ("blue/000.png",)], ("path",))
    result = shufflenet("predict", "models", photos / "red/001.png", path, "--json")
    assert [Path(entry["path"]).name for entry in json.loads(result.stdout)] == ["001.png", "000.png", "000.png"]
    write_csv(path, [("../x.png",)], ("path",))
    result = shufflenet("predict", "models", path)
    assert result.exit_code == 1
    assert "todo.csv', row 2: the path '../x.png' leads out of the table's folder" in result.stderr
