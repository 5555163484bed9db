"""Every command with names that a stranger chose, for classes, images, folders, runs, experiments and tags.

What people see is looked at: both streams, CSV, HTML and the texts of figures. JSON keeps the names: it is data.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from mlflow import MlflowClient

from shufflenet_mlflow.export.bench_device import FORMAT
from shufflenet_mlflow.models.search_space import SUPERNET
from shufflenet_mlflow.runtime.text import visible
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.test_option_rules import ARGUMENTS
from tests.test_settings import commands

NAME = "=cmd()\x1b[31m\u202e$x^$\nINJECTED\x9b1m\r\t$y_{"
CLASSES = (NAME, f"@{NAME}")

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the texts of every figure that is saved."""
    texts: list[str] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **named: Any) -> None:
        save(figure, *arguments, **named)
        texts.extend(text.get_text() for text in figure.findobj(Text))  # type: ignore[attr-defined]

    monkeypatch.setattr(Figure, "savefig", savefig)
    return texts


def make_data(root: Path) -> Path:
    for split in ("train", "val"):
        write_images(root / NAME / split, ("a", "b"), 5)
        for plain, name in zip(("a", "b"), CLASSES, strict=True):
            folder = (root / NAME / split / plain).rename(root / NAME / split / name)
            first = min(folder.iterdir())
            first.rename(folder / f"{NAME}{first.suffix}")
    return root / NAME


def problems(where: str, text: str) -> Iterator[str]:
    for line in text.split("\n"):
        if visible(line) != line or line.startswith("INJECTED"):
            yield f"{where}: {line!r}"


def test_no_command_lets_a_name_out(tmp_path: Path, shufflenet: Invoke, client: MlflowClient, drawn: list[str]) -> None:
    data = make_data(tmp_path)
    train, val = data / "train", data / "val"
    image = val / NAME / f"{NAME}.png"
    common = ["--train-dir", train, "--val-dir", val, "--input-size", 32, "--workers", 0]
    wrong: list[str] = []
    walked: set[str] = set()

    def walk(words: str, *rest: object, status: int = 0) -> str:
        for more in ([], ["--debug"]) if status else ([],):
            result = shufflenet(*words.split(), *rest, *more)
            assert result.exit_code == status, (words, rest, result.output)
            walked.add(words)
            wrong.extend(problems(f"{words}, stdout", result.stdout))
            wrong.extend(problems(f"{words}, stderr", result.stderr))
        return result.stdout

    def trained(*rest: object) -> str:
        small = ["--batch-size", 4, "--total-iters", 2, "--no-log-models", "--experiment", NAME, "--run-name", NAME]
        walk("train", *common, *small, *rest)
        [experiment] = [one for one in client.search_experiments() if one.name != "Default"]
        return client.search_runs([experiment.experiment_id], max_results=1)[0].info.run_id

    run, other = trained("--save-dir", tmp_path / "m" / NAME), trained("--seed", 1, "--save-dir", tmp_path / "n")
    for one in (run, other):
        client.set_tag(one, "x", NAME)  # MLflow takes no such key
        client.set_tag(one, "job", NAME)
        walk("eval", one, "--workers", 0)
    weights = tmp_path / "m" / NAME
    walk("predict", weights, image, val)
    table = walk("predict", weights, image, val, "--format", "csv")
    walk("runs", "--experiment", NAME, "--columns", "name,tags.job,tags.x")
    walk("runs show", run)
    walk("compare", run, other, "--out", tmp_path / "page")
    walk("checkpoints ls", weights)
    walk("checkpoints verify", weights)
    walk("checkpoints pull", run, "--cache-dir", tmp_path / NAME / "cache")
    walk("checkpoints prune", weights, "--keep-last", 1, "--dry-run")
    walk("checkpoints promote", run, "--name", f"x{NAME}", "--alias", "a")
    walk("export", weights, "--output", tmp_path / NAME / "x.pt2")
    walk("sync", weights)
    walk("models")
    walk("recipes")
    walk("runs mend", run)
    measured = {"file": f"{NAME}.onnx", "bytes": 1, "sha256": "0" * 64, "measurements": []}
    document = {"format": FORMAT, "machine": {"cpu": NAME}, "files": [measured]}
    (tmp_path / NAME / "x.json").write_text(json.dumps(document))
    walk("runs log-bench", run, tmp_path / NAME / "x.json")
    walk("eval", tmp_path / NAME / "x.pt2", "--val-dir", val, "--workers", 0)
    walk("data check", train, "--out", tmp_path / NAME / "check.html", status=0)
    walk("data split", train, tmp_path / NAME / "split")
    walk("data mean", train, "--input-size", 32, "--output", tmp_path / NAME / "mean.npy")
    walk("data digits", tmp_path / NAME / "digits")
    walk("bench", "--train-dir", train, "--input-size", 32, "--workers", 0, "--iterations", 2, "--batch-size", 4)
    study = ["--save-dir", tmp_path / NAME / "study", "--experiment", NAME]
    short = ["--trials", 2, "--rungs", 1, "--batch-size", 4, "--total-iters", 2]
    walk("tune", *common, "--study", "s", "--param", "lr=0.01,0.02", *short, *study)
    walk("tune show", "s", *study)
    walk("tune stop", "s", *study[:2])
    walk("train", *common, "--model", SUPERNET, *short[4:], "--save-dir", tmp_path / "supernet", "--run-name", NAME)
    kept = ["--save-dir", tmp_path / NAME / "search", "--experiment", NAME, "--run-name", NAME, "--workers", 1]
    walk("search", tmp_path / "supernet", "--population", 1, "--generations", 0, *kept)
    for words, arguments in (
        ("eval", [NAME]),
        ("predict", [weights, f"no{NAME}"]),
        ("sync", [NAME]),
        ("runs show", [NAME]),
    ):
        walk(words, *arguments, status=1)
    walk("checkpoints ls", f"runs:/{NAME}", status=1)

    assert walked == ARGUMENTS.keys()
    assert walked | {"", "checkpoints", "data", "completion"} == commands().keys()

    tables = [Path(client.download_artifacts(run, "evaluation", str(tmp_path))).rglob("*.csv")]
    texts = {"predict": table} | {path.name: path.read_text() for found in tables for path in found}
    assert len(texts) > 2
    for name, text in texts.items():
        wrong.extend(problems(name, text))
        cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
        wrong.extend(f"{name}: {cell}" for cell in cells if cell.startswith(("=", "@", "+")))
    page = (tmp_path / "page" / "compare.html").read_text()
    page = re.sub("<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # Bokeh's own code holds what it likes
    wrong.extend(problems("compare.html", page))
    assert any("cmd()" in text for text in drawn)
    for text in drawn:
        wrong.extend(problems("figure", text))
        if re.search(r"(?<!\\)\$", text):
            wrong.append(f"figure: {text!r}")
    assert not wrong, "\n".join(wrong[:40])

    document = json.loads(shufflenet("predict", weights, image, "--json").stdout)
    assert document[0]["path"] == str(image)
    assert document[0]["label"] in CLASSES
