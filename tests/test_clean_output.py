"""Names of files, classes and runs as a stranger could choose them: in terminals and spreadsheets they do nothing."""

import csv
import io
from pathlib import Path

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.runtime.serialization import from_csv_cell, to_csv
from shufflenet_mlflow.runtime.text import visible
from tests.support.command_line import Invoke

HOSTILE = "a\x1b]0;x\x07b\x9b31mc\u202ed\u2028e\u200bf\x7f"


def test_only_what_controls_is_escaped() -> None:
    shown = visible(HOSTILE + "\udcff")
    assert shown.isprintable()
    assert shown.startswith("a\\x1b]0;x\\x07b\\x9b31mc\\u202ed")
    for text in ("Katze", "Größe 3", "猫", "a\u00a0b", "c:\\\\x"):
        assert visible(text) == text
    assert visible("a\nb", keep="\n") == "a\nb"


@pytest.mark.parametrize(
    "text", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", " =1", "'=1", "''@x", "-1.5", "+3e5", "cat", "'cat", "'-1.5", ""]
)
def test_a_table_computes_nothing_and_can_be_read_again(text: str) -> None:
    (cell,) = next(csv.reader(io.StringIO(to_csv([[text]]), newline=""))) or [""]
    assert from_csv_cell(cell) == visible(text)
    assert not cell.lstrip().startswith(("=", "+x", "-x", "@"))
    assert not cell.startswith(("\t", "\r"))
    assert to_csv([["-1.5", -1.5]]) == "-1.5,-1.5\n"


def test_run_names_and_tags_control_no_terminal(client: MlflowClient, shufflenet: Invoke) -> None:
    experiment = client.create_experiment("shufflenet")
    run = client.create_run(experiment, run_name=HOSTILE, tags={"job": HOSTILE}).info.run_id
    other = client.create_run(experiment, run_name=HOSTILE).info.run_id
    for words in (("runs",), ("runs", "--columns", "name,tags.job"), ("runs", "show", run), ("compare", run, other)):
        result = shufflenet(*words)
        assert result.exit_code == 0, result.output
        assert (result.stdout + result.stderr).replace("\n", "").isprintable(), words


def test_everything_printed_goes_one_way() -> None:
    cli = Path(__file__).parents[1] / "cli"
    direct = [path.name for path in cli.glob("*.py") if "click.echo(" in path.read_text()]
    assert sorted(direct) == ["completion.py", "predictions.py", "say.py"]
