"""`shufflenet predict`: how images are named, what is printed, and that it is the network's answer."""

import csv
import io
import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from PIL import Image

from shufflenet_mlflow import create_model, save_checkpoint
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.loader import WORKERS_FROM, BadImageLog
from shufflenet_mlflow.data.pictures import find_pictures
from shufflenet_mlflow.errors import ConfigError, DataError
from shufflenet_mlflow.evaluation.evaluate import EvalSettings, evaluate
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import move_model
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.text import FILE_NAME_BYTES, visible
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.workflows.loading import ModelRequest
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.training import run

CPU = torch.device("cpu")
NETWORK = ("--model", "shufflenet_v2_x0_5", "--input-size", 32)
CLASSES = 7


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a network of seven unnamed classes whose answers differ between images."""
    torch.manual_seed(0)
    model = create_model("shufflenet_v2_x0_5", CLASSES)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return save_checkpoint({"state_dict": model.state_dict()}, 1, directory=tmp_path_factory.mktemp("weights"))


Predict = Callable[..., Result]


def test_turned_and_upright_copies_get_the_same_answer(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    run(images, "--save-dir", "models", "--total-iters", 6)
    upright = Image.open(images / "val" / "red" / "000.png")
    copies, exif = tmp_path / "copies", Image.Exif()
    copies.mkdir()
    undoing = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")
    for orientation, way in enumerate((None, *undoing), 1):
        exif[0x0112] = orientation
        stored = upright if way is None else upright.transpose(Image.Transpose[way])
        stored.save(copies / f"{orientation}.webp", lossless=True, exif=exif)
        stored.resize((stored.width * 32, stored.height * 32)).save(copies / f"{orientation} large.jpg", exif=exif)
    rows = json.loads(shufflenet("predict", "models", copies, "--top", 3, "--json").stdout)
    assert len(rows) == 16
    for size, difference in ((".webp", 0.01), (" large.jpg", 0.05)):  # JPEG loses more in one direction
        found = [row["top"] for row in rows if row["path"].endswith(size)]
        of_red = [entry["probability"] for top in found for entry in top if entry["label"] == "red"]
        assert len(of_red) == 8
        assert max(of_red) - min(of_red) < difference


@pytest.fixture
def predict(weights: Path) -> Predict:
    """Run the command in this process."""

    def invoke(*words: object, stdin: bytes = b"") -> Result:
        return CliRunner().invoke(main, ["predict", str(weights), *map(str, (*NETWORK, *words))], input=stdin)

    return invoke


def process(weights: Path, *words: object) -> list[str]:
    """Return the command line of `predict` in its own process."""
    return [sys.executable, "-m", "shufflenet_mlflow", "predict", *map(str, (weights, *NETWORK, *words))]


def encoded(seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def put(*paths: str | bytes) -> None:
    """Write a different image to each path."""
    for number, path in enumerate(paths):
        name = os.fsdecode(path)
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        Path(name).write_bytes(encoded(number))


def found(*words: str, stdin: bytes = b"") -> list[str]:
    return list(find_pictures(words, lambda: io.BytesIO(stdin)).paths())


def rows_of(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---------------------------------------------------------------- which images are meant


def test_files_folders_and_repetitions() -> None:
    """Images keep the order given, folders are sorted, and repeated names are repeated."""
    put("b.png", "photos/2.png", "photos/10.jpg", "photos/more/1.PNG", "photos/.hidden.png", "photos/.x/1.png")
    Path("photos/notes.txt").touch()
    below = ["photos/10.jpg", "photos/2.png", "photos/more/1.PNG"]
    assert found("photos", "b.png", "photos/2.png") == [*below, "b.png", "photos/2.png"]
    assert found("photos/.hidden.png", "photos/notes.txt", "./b.png") == [
        "photos/.hidden.png",
        "photos/notes.txt",
        "./b.png",
    ]


PATTERNS: dict[str, list[str]] = {
    "photos/*.png": ["photos/1.png", "photos/2.png"],
    "photos/?.png": ["photos/1.png", "photos/2.png"],
    "photos/[2-9].*": ["photos/2.png"],
    "photos/**/*.png": ["photos/1.png", "photos/2.png", "photos/a/3.png", "photos/a/b/4.png"],
    "**/[34].png": ["photos/a/3.png", "photos/a/b/4.png"],
    "./**/b/*": ["./photos/a/b/4.png"],
    "photos/**": ["photos/1.png", "photos/2.png", "photos/a/3.png", "photos/a/5.jpeg", "photos/a/b/4.png"],
    "photos/**/": ["photos/1.png", "photos/2.png", "photos/a/3.png", "photos/a/5.jpeg", "photos/a/b/4.png"],
    "photos/*": ["photos/1.png", "photos/2.png", "photos/a/3.png", "photos/a/5.jpeg", "photos/a/b/4.png"],
    "p*/**/b": ["photos/a/b/4.png"],
    "p*/a/**/*.png": ["photos/a/3.png", "photos/a/b/4.png"],
    "photos/**/a/**/4*": ["photos/a/b/4.png"],
    "photos/*.tif*": [],
    "photos/**/*.gif": [],
    "nowhere/**/*.png": [],
    "photos/1.png/**": [],
    "photos/*.txt": ["photos/notes.txt"],
    "photos/**/*.txt": ["photos/notes.txt"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    """Patterns expand sorted, as in a shell, to images only; names without wildcards may be any file."""
    put("photos/2.png", "photos/1.png", "photos/a/3.png", "photos/a/b/4.png", "photos/a/5.jpeg", "photos/.x/6.png")
    Path("photos/notes.txt").touch()
    os.symlink(".", "photos/a/b/here")  # where a pattern could go round and round
    os.symlink(".", "photos/a/b/again")
    if not PATTERNS[pattern]:
        with pytest.raises(DataError, match="no image matches the pattern"):
            found(pattern)
        return
    assert found(pattern) == PATTERNS[pattern]


def test_an_existing_name_wins_over_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    put("cat[1].png", "cat1.png", "what?/x.png", "~/here.png", "home/there.png")
    monkeypatch.setenv("HOME", os.path.abspath("home"))
    assert found("cat[1].png") == ["cat[1].png"]
    assert found("what?") == ["what?/x.png"]
    assert found("cat[1-3].png") == ["cat1.png"]
    assert found("~/here.png") == ["~/here.png"]
    assert found("~/there.png", "~/*.png") == [os.path.abspath("home/there.png")] * 2


def test_paths_on_standard_input() -> None:
    """Paths are one per line or separated by NUL, and are never patterns."""
    put("a b.png", "c[1].png", "folder/2.png", "folder/1.png", "line\nbreak.png", "-", " x ")
    assert found("-", stdin=b"a b.png\nc[1].png\n\nfolder\n-\n x ") == [
        *("a b.png", "c[1].png", "folder/1.png", "folder/2.png", "-", " x "),
    ]
    assert found("-", stdin=b"a b.png\r\nfolder/1.png\r\n") == ["a b.png", "folder/1.png"]
    assert found("-", stdin=b"line\nbreak.png\0folder/1.png\0") == ["line\nbreak.png", "folder/1.png"]
    assert found("folder", "-", "a b.png", stdin=b"c[1].png") == ["folder/1.png", "folder/2.png", "c[1].png", "a b.png"]


def test_paths_from_find() -> None:
    """Names of all kinds, with and without NULs."""
    put(*ODD)
    printed = {
        option: subprocess.run(["find", ".", "-name", "*.png", option], capture_output=True, check=True).stdout
        for option in ("-print", "-print0")
    }
    expected = sorted(f"./{os.fsdecode(name)}" for name in ODD)
    assert sorted(found("-", stdin=printed["-print0"])) == expected
    lines = b"".join(line + b"\n" for line in printed["-print"].splitlines() if os.path.exists(line))
    assert sorted(found("-", stdin=lines)) == [name for name in expected if "\n" not in name]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_an_image_on_standard_input(kind: str) -> None:
    put("a.png")
    content = encoded(kind=kind)
    pictures = find_pictures(("a.png", "-", "a.png"), lambda: io.BytesIO(content))
    assert list(pictures.paths()) == ["a.png", "-", "a.png"]
    assert [isinstance(pictures.source(index), str) for index in range(3)] == [True, False, True]
    assert pictures.source(1).read() == content


@pytest.mark.parametrize("text", [b"P2\n2 2\n9\n0 3 6 9\n", b"P3 1 1 255 0 0 255 "])
def test_text_on_standard_input(text: bytes) -> None:
    """A list begins with a path that exists."""
    assert find_pictures("-", lambda: io.BytesIO(text)).piped == text
    put(os.fsdecode(text.split(b"\n")[0]))
    with pytest.raises(DataError, match="does not exist") if b"\n" in text else pytest.raises(AssertionError):
        assert find_pictures("-", lambda: io.BytesIO(text)).piped is not None


REFUSED = {
    ("nowhere.png",): "the image 'nowhere.png' does not exist",
    ("a.png", "empty"): "the folder 'empty' holds no images",
    ("*.jpeg",): "no image matches the pattern '*.jpeg'",
    ("~nobody-of-that-name/1.png",): "'~nobody-of-that-name/1.png' does not exist",
    ("dangling.png",): "'dangling.png' does not exist",
}


@pytest.mark.parametrize("words", REFUSED)
def test_missing_paths(words: tuple[str, ...], predict: Predict) -> None:
    """The error comes before the checkpoint is read."""
    put("a.png")
    Path("empty").mkdir()
    os.symlink("nothing", "dangling.png")
    result = CliRunner().invoke(main, ["predict", "no-checkpoint", *words])
    assert (result.exit_code, result.stdout) == (1, "")
    assert REFUSED[words] in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        (b"", "standard input is empty"),
        (b"\n\r\n", "standard input is empty"),
        (b"\0", "standard input is empty"),
        (b"a.png\nnowhere.png\n", "'nowhere.png' does not exist (entry 2 on standard input)"),
        (b"nowhere.png\n", "'nowhere.png' does not exist (entry 1 on standard input)"),
        (b"P6 first\n", "'P6 first' does not exist (entry 1 on standard input)"),
        (b"a.png\0empty", "'empty' holds no images (entry 2 on standard input)"),
        (b"a.png\n*.png\n", "'*.png' does not exist (entry 2 on standard input)"),
        (encoded()[:60], "'-' is not a readable image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "'-' is not a readable image"),
    ],
)
def test_invalid_standard_input(stdin: bytes, expected: str, predict: Predict) -> None:
    put("a.png")
    Path("empty").mkdir()
    result = predict("-", stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, "")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_standard_input_only_once(predict: Predict) -> None:
    with pytest.raises(ConfigError, match="only once"):
        found("-", "-", stdin=b"x")
    result = predict("-", "-")
    assert (result.exit_code, "only once" in result.stderr) == (2, True)


def test_no_images_given(predict: Predict) -> None:
    """A pipe is read only on request; the error says how."""
    result = predict(stdin=encoded())
    assert result.exit_code == 2
    assert "- for standard input" in result.stderr


def test_standard_input_that_is_closed(weights: Path) -> None:
    words = ["sh", "-c", 'exec "$@" <&-', "sh", *process(weights, "-")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ran.returncode, "standard input is empty" in ran.stderr) == (1, True), ran.stderr


# ---------------------------------------------------------------- what is printed

ODD = [
    *("plain.png", "with space.png", "comma,s.png", 'quo"te.png', "'single'.png", "line\nbreak.png", "tab\tbed.png"),
    *("umlaut-äöü-ß.png", "漢字.png", "emoji-🐱.png", "-dash.png", "[1].png", "{a,b}.png", "$HOME.png", "a;b.png"),
    *('"all",\n"of" it.png', "#.png", "%s.png", "\\n.png", "=1+1.png"),
    b"latin-\xe4.png",
    b"\xff\xfe.png",
]
"""Names of files that formats like to break on; the last ones are no UTF-8."""


def in_csv(name: str) -> str:
    """Return a name as CSV has it: controls as escapes, bytes that are no UTF-8 as they are."""
    return visible(name, keep=FILE_NAME_BYTES)


def test_csv_brings_back_every_name(predict: Predict) -> None:
    """Only those that control a terminal are changed."""
    put(*ODD)
    result = predict("./**/*.png", "--format", "csv", "--top", 3)
    assert result.exit_code == 0, result.output
    text = result.stdout_bytes.decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["path"] for row in rows] == [in_csv(path) for path in sorted(f"./{os.fsdecode(name)}" for name in ODD)]
    expected = rows_of(predict(".", "--top", 3, "--json"))
    by_path = {in_csv(os.path.normpath(row["path"])): row for row in expected}
    assert {row["path"][2:] for row in rows} == by_path.keys()
    for row in rows:
        top = by_path[os.path.normpath(row["path"])]["top"]
        suffixes = ("", "_2", "_3")
        assert [row[f"label{suffix}"] for suffix in suffixes] == [entry["label"] for entry in top]
        assert [float(row[f"probability{suffix}"]) for suffix in suffixes] == [entry["probability"] for entry in top]


def test_csv_with_names_drawn_at_random(predict: Predict) -> None:
    """The same names also pass through a list, as JSON."""
    dice = random.Random(0)
    letters = "ab,;\"'\n\r\t äß漢\u2028[]{}*?~-=\\%\udce4"
    names = {"".join(dice.choices(letters, k=dice.randint(1, 12))).strip("-") + ".png" for _ in range(100)}
    put(*(f"drawn/{name}" for name in names))
    listed = b"\0".join(os.fsencode(f"drawn/{name}") for name in names)
    result = predict("-", "--format", "csv", "--top", 1, stdin=listed)
    assert result.exit_code == 0, result.output
    text = result.stdout_bytes.decode("utf-8", "surrogateescape")
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:] == [
        in_csv(f"drawn/{name}") for name in names
    ]
    assert [row["path"] for row in rows_of(predict("-", "--json", stdin=listed))] == [f"drawn/{name}" for name in names]


def test_csv_for_pandas(predict: Predict) -> None:
    put("a,b.png", "c.png")
    frame = pd.read_csv(io.StringIO(predict("a,b.png", "c.png", "--format", "csv", "--top", 2).stdout))
    assert list(frame.columns) == ["path", "label", "probability", "label_2", "probability_2"]
    assert list(frame["path"]) == ["a,b.png", "c.png"]
    assert (frame["probability"] >= frame["probability_2"]).all()


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_more_labels_than_classes(form: str, predict: Predict) -> None:
    put("a.png")
    result = predict("a.png", "--top", 50, "--format", form)
    assert result.exit_code == 0, result.output
    if form == "json":
        [row] = json.loads(result.stdout)
        assert {entry["label"] for entry in row["top"]} == {str(label) for label in range(CLASSES)}
        assert sum(entry["probability"] for entry in row["top"]) == pytest.approx(1)
        return
    title, row = result.stdout.splitlines()
    assert len(row.split("," if form == "csv" else None)) == 1 + 2 * CLASSES
    assert title.startswith("path,label" if form == "csv" else "path ")


def test_the_table(predict: Predict) -> None:
    """Columns begin in the same place in every row, and nothing in a name breaks a row."""
    put("a.png", "long-name-of-a-file.png", "漢字.png", "line\nbreak.png")
    result = predict("a.png", "long-name-of-a-file.png", "漢字.png", "line\nbreak.png", "--top", 2, "--batch-size", 1)
    title, *rows = result.stdout.splitlines()
    assert title.split() == ["path", "label", "probability", "others"]
    assert len(rows) == 4
    assert [row.split("  ")[0] for row in rows] == [
        "a.png",
        "long-name-of-a-file.png",
        "漢字.png",
        r"line\nbreak.png",
    ]
    dots = [row.index(".", 30) + (2 if "漢" in row else 0) for row in rows]  # these letters are two cells wide
    assert dots == [title.index("probability") + 6] * 4
    alone = predict("a.png", "--top", 1).stdout.splitlines()
    assert alone[0].split() == ["path", "label", "probability"]
    assert [len(row.split()) for row in alone] == [3, 3]


def on_a_terminal(words: list[str], columns: int, *, stdout: bool) -> tuple[str, bytes]:
    """Return what a terminal of some width shows, and what a pipe received if stdout is one."""
    main_end, other_end = pty.openpty()
    subprocess.run(["stty", "cols", str(columns), "rows", "24"], stdin=other_end, check=True)
    environment = {**{key: value for key, value in os.environ.items() if key != "COLUMNS"}, "TERM": "xterm"}
    to = other_end if stdout else subprocess.PIPE
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=to, stderr=other_end, env=environment) as ran:
        os.close(other_end)
        screen = b"".join(iter(lambda: read_some(main_end), b""))
        os.close(main_end)
        piped = ran.stdout.read() if ran.stdout else b""
    assert ran.returncode == 0, screen
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode()), piped


def read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


def test_a_terminal_of_80_columns(weights: Path) -> None:
    """No row is longer, and a progress bar below the rows erases none of them."""
    put(*(f"a-folder-with-a-rather-long-name/and-another-one-below-it/{number:03}.png" for number in range(8)))
    screen, _ = on_a_terminal(process(weights, ".", "--batch-size", 2, "--top", 7), 80, stdout=True)
    rows = [line for line in screen.replace("\r", "\n").splitlines() if line.startswith("…") and ".png" in line]
    assert [row.split()[0][-7:] for row in rows] == [f"{number:03}.png" for number in range(8)]
    assert all(len(row) <= 80 and len(row.split()) >= 5 for row in rows)


def test_a_file_gets_its_rows_while_the_terminal_has_the_bar(weights: Path) -> None:
    put(*(f"photos/{number:03}.png" for number in range(8)))
    shown, piped = on_a_terminal(process(weights, "photos", "--batch-size", 2), 80, stdout=False)
    assert "predicting" in shown
    assert "photos/" not in shown
    assert [line.split()[0] for line in piped.decode().splitlines()[1:]] == [f"photos/{n:03}.png" for n in range(8)]


def test_one_document(predict: Predict) -> None:
    put("a.png", "b.png")
    result = predict("a.png", "b.png", "--json")
    assert json.loads(result.stdout) == json.loads(predict("a.png", "b.png", "--format", "json").stdout)
    assert [row.keys() for row in json.loads(result.stdout)] == [{"path", "label", "probability", "top"}] * 2
    assert predict("a.png", "--json", "--format", "json").exit_code == 0
    result = predict("a.png", "--json", "--format", "csv")
    assert (result.exit_code, "exclude each other" in result.stderr) == (2, True)


def test_a_closed_pipe_ends_silently(weights: Path) -> None:
    """With `| head` it ends silently."""
    put(*(f"photos/{number:03}.png" for number in range(300)))
    words = process(weights, "photos", "--format", "csv", "--batch-size", 4, "--workers", 2)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        assert ran.stdout.readline().startswith("path,")
        ran.stdout.close()
        assert ran.stderr.read() == ""
    assert ran.returncode == 1


# ---------------------------------------------------------------- unreadable images


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_an_unreadable_image_ends_it(form: str, predict: Predict) -> None:
    """Rows of earlier batches are printed; an incomplete JSON document is not."""
    put(*(f"photos/{number}.png" for number in range(6)))
    Path("photos/4.png").write_bytes(b"nothing")
    result = predict("photos", "--format", form, "--batch-size", 2, "--top", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: 'photos/4.png' is not a readable image")
    assert result.stderr.count("\n") == 1
    printed = result.stdout.splitlines()[1:]
    assert len(printed) == (0 if form == "json" else 4)


def test_unreadable_images_are_left_out(predict: Predict) -> None:
    put(*(f"photos/{number}.png" for number in range(6)))
    Path("photos/1.png").write_bytes(b"nothing")
    Path("photos/4.png").write_bytes(b"")
    result = predict("photos", "--on-bad-image", "skip", "--json", "--batch-size", 2)
    assert [row["path"] for row in rows_of(result)] == [f"photos/{number}.png" for number in (0, 2, 3, 5)]
    assert [line.split()[2] for line in result.stderr.splitlines()] == ["'photos/1.png'", "'photos/4.png'"]


def test_an_image_without_a_byte_is_not_passed_over(predict: Predict) -> None:
    put("photos/1.png")
    Path("photos/0.png").touch()
    result = predict("photos")
    assert (result.exit_code, "'photos/0.png' is not a readable image" in result.stderr) == (1, True)


def test_only_unreadable_images(predict: Predict) -> None:
    """The output is a header without rows."""
    Path("bad.png").write_bytes(b"nothing")
    result = predict("bad.png", "--on-bad-image", "skip", "--format", "csv", "--top", 2)
    assert (result.exit_code, result.stdout) == (0, "path,label,probability,label_2,probability_2\n")
    assert predict("bad.png", "--on-bad-image", "skip", "--json").stdout == "[]\n"
    assert predict("-", "--on-bad-image", "skip", "--json", stdin=encoded()[:50]).stdout == "[]\n"


# ---------------------------------------------------------------- what the network says


def test_predictions_are_those_of_the_network(images: Path, shufflenet: Invoke) -> None:
    summary = run(images)
    files = sorted((images / "val").rglob("*.png"))
    rows = rows_of(shufflenet("predict", summary.run_id, images / "val", "--workers", 1, "--json"))
    assert [row["path"] for row in rows] == [str(path) for path in files]
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert right / len(files) == summary.result.val_top1
    assert all(row["top"][0] == {"label": row["label"], "probability": row["probability"]} for row in rows)
    assert rows[0]["top"][0]["probability"] >= rows[0]["top"][1]["probability"]
    assert sum(entry["probability"] for entry in rows[0]["top"]) == pytest.approx(1)
    ones = rows_of(shufflenet("predict", summary.run_id, files[0], files[1], "--top", 1, "--json"))
    assert [len(row["top"]) for row in ones] == [1, 1]


def evaluated(client: MlflowClient, run_id: str, val_dir: Path) -> dict[str, dict[str, str]]:
    """Return what `eval` recorded for each image, by path."""
    [folder] = client.list_artifacts(run_id, f"evaluation/{val_dir.parent.name}-{val_dir.name}")
    text = Path(client.download_artifacts(run_id, f"{folder.path}/predictions.csv")).read_text("utf-8")
    return {str(val_dir / row["path"]): row for row in csv.DictReader(io.StringIO(text))}


def test_each_image_is_predicted_as_in_an_evaluation(
    client: MlflowClient, images: Path, shufflenet: Invoke, tmp_path: Path
) -> None:
    summary = run(images)
    val_dir = write_images(tmp_path / "more" / "val", per_class=20, seed=2)
    result = shufflenet("eval", summary.run_id, "--val-dir", val_dir, "--batch-size", 32, "--json")
    assert result.exit_code == 0, result.output
    expected = evaluated(client, summary.run_id, val_dir)
    rows = rows_of(shufflenet("predict", summary.run_id, val_dir, "--batch-size", 32, "--workers", 2, "--json"))
    assert [row["path"] for row in rows] == sorted(expected)
    assert [row["label"] for row in rows] == [expected[row["path"]]["predicted"] for row in rows]
    probabilities = [float(expected[row["path"]]["probability"]) for row in rows]
    assert [row["probability"] for row in rows] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize(("count", "equal"), [(WORKERS_FROM, True), (WORKERS_FROM - 1, False)])
def test_predictions_equal_an_evaluation_bit_for_bit(count: int, equal: bool, weights: Path, predict: Predict) -> None:
    """Many images: batch normalisation is fused then, as in `eval`; for fewer, rounding differs."""
    put(*(f"photos/class/{number:03}.png" for number in range(count)))
    network = ModelRequest(str(weights), model="shufflenet_v2_x0_5", input_size=32).load(Connection()).network
    expected: list[float] = []
    evaluate(
        move_model(network.module, CPU),
        list_images("photos"),
        network.preprocess,
        EvalSettings(32, 0, CPU),
        bad_images=BadImageLog(skip=False),
        context=JobContext(LoggingReporter()),
        observe=lambda _batch, logits: expected.extend(torch.softmax(logits, 1).amax(1).tolist()),
    )
    rows = rows_of(predict("photos", "--batch-size", 32, "--workers", 0, "--json"))
    probabilities = [row["probability"] for row in rows]
    assert probabilities == pytest.approx(expected, abs=1e-4)
    assert (probabilities == expected) is equal


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 0), (7, 2), (64, 2)])
def test_order_and_answers_whatever_the_batches(batch_size: int, workers: int, predict: Predict) -> None:
    put(*(f"photos/{number:02}.png" for number in range(30)))
    order = [f"photos/{number:02}.png" for number in random.Random(1).sample(range(30), 30)]
    [*expected] = rows_of(predict(*order, "--json"))
    rows = rows_of(predict(*order, "--batch-size", batch_size, "--workers", workers, "--json"))
    assert [row["path"] for row in rows] == order
    assert len({row["label"] for row in rows}) > 1
    assert [row["probability"] for row in rows] == pytest.approx([row["probability"] for row in expected], abs=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_from_a_pipe_among_files(workers: int, predict: Predict) -> None:
    """It gets the same answer as the same bytes in a file, in the right position."""
    put("a.png", "b.png")
    Path("c.jpg").write_bytes(encoded(5, "JPEG"))
    expected = rows_of(predict("a.png", "c.jpg", "b.png", "--json"))
    words = ("a.png", "-", "b.png", "--json", "--workers", workers)
    rows = rows_of(predict(*words, stdin=encoded(5, "JPEG")))
    assert [row["path"] for row in rows] == ["a.png", "-", "b.png"]
    assert [row["top"] for row in rows] == [row["top"] for row in expected]


@pytest.fixture
def many_files() -> Iterator[Path]:
    """Create 20,000 empty files."""
    for number in range(20_000):
        folder = Path("many", str(number % 10))
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / f"{number}.jpg", os.O_CREAT))
    yield Path("many")
    shutil.rmtree("many")


def test_many_names_take_little_memory(many_files: Path) -> None:
    """However they are given, they are found in the same order and take little memory."""
    below = found("many")
    assert len(below) == 20_000
    assert found("many/**/*.jpg") == found("many/*/*.jpg") == found("many/**") == below
    pictures = find_pictures("-", lambda: io.BytesIO("\n".join(below).encode()))
    assert list(pictures.paths()) == [pictures.path(index) for index in range(len(pictures))] == below
    assert pictures.files.text.nbytes + pictures.files.ends.nbytes < 20_000 * 30
