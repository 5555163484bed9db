"""The commands that are suggested at the end of another one work as printed."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from mlflow import MlflowClient

from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images

BLANKS = "it's a  folder    here"
"""A name with a quote, and with as many blanks as stand before a comment."""


def suggested(result: Result) -> list[list[str]]:
    """Return the words of each `shufflenet` command that was suggested."""
    assert result.exit_code == 0, result.output
    lines = re.findall(r"^(?:next:|     ) (.*)$", result.stderr, re.MULTILINE)
    commands = [shlex.split(line, comments=False) for line in lines if line.startswith("shufflenet ")]
    assert lines, result.stderr
    return [words[1:] for words in commands]


@pytest.mark.parametrize("is_typed", [pytest.param(False, marks=pytest.mark.long), True])
def test_suggestions_work_as_printed(shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch, is_typed: bool) -> None:
    """After skipped images, in folders with any name, in another store and another experiment."""
    folder = Path(BLANKS)
    for part, count, seed in (("train", 12, 0), ("val", 5, 1)):
        write_images(folder / part, per_class=count, seed=seed)
        (folder / part / "red" / "000.png").write_bytes(b"nothing")
    store = []
    if is_typed:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        store = ["--tracking-uri", f"sqlite:///{Path('other store.db').absolute()}"]
    options = [*small_options(folder), *store, "--on-bad-image", "skip", "--experiment", "pets"]
    trained = shufflenet("train", *options, "--save-dir", folder / "models")
    (evaluate,) = suggested(trained)
    evaluated = shufflenet(*evaluate)
    compare, promote = suggested(evaluated)
    run_id = evaluate[1]
    (second,) = suggested(shufflenet("train", *options, "--total-iters", 2))
    assert shufflenet(*[second[1] if word == "RUN" else word for word in _uncommented(compare)]).exit_code == 0
    listed = shufflenet("checkpoints", "ls", folder / "models", *store)
    for words in suggested(listed):
        assert shufflenet(*words).exit_code == 0, words
    shown = shufflenet("runs", "show", run_id, *store)
    for words in suggested(shown):
        assert shufflenet(*words).exit_code == 0, words
    verified = shufflenet("checkpoints", "verify", folder / "models", *store)
    for words in suggested(verified):
        assert shufflenet(*words).exit_code == 0, words
    assert ("--tracking-uri" in promote) == is_typed
    plain = shufflenet("eval", folder / "models", *store)
    (predict,) = suggested(plain)
    picture = str(folder / "val" / "blue" / "000.png")
    assert shufflenet(*[picture if word == "IMAGE" else word for word in predict]).exit_code == 0
    pruned = shufflenet("checkpoints", "prune", folder / "models", "--keep-last", 1, *store)
    for words in suggested(pruned):
        assert shufflenet(*words).exit_code == 0, words
    pulled = shufflenet("checkpoints", "pull", f"runs:/{run_id}@latest", "--output", folder / "out", *store)
    (again,) = suggested(pulled)
    again = [str(folder / "val") if word == "DIR" else word for word in again]
    assert shufflenet(*again).exit_code == 0


def _uncommented(words: list[str]) -> list[str]:
    """Return a suggestion without the remark that follows it."""
    return [word for word in words if word not in ["another", "run,", "evaluated", "on", "the", "same", "images"]]


def test_runs_in_other_experiments_are_mentioned(images: Path, shufflenet: Invoke, client: MlflowClient) -> None:
    """Runs of `mlflow run` are in `Default`; with --experiment, only that experiment is mentioned."""
    shufflenet("train", *small_options(images), "--total-iters", 2, "--experiment", "Default")
    line = "other experiments hold runs, too: Default (1 run); --experiment NAME lists them"
    missing = shufflenet("runs")
    assert (missing.exit_code, line in missing.stderr) == (0, True), missing.output
    assert "experiment shufflenet: no runs" in missing.stdout
    client.create_experiment("shufflenet")
    assert line in shufflenet("runs").stderr
    assert shufflenet("runs", "--json").stdout == "[]\n"
    assert "other experiments" not in shufflenet("runs", "--experiment", "Default").stderr
