"""Help that fits a screen, and suggestions for mistyped options."""

import random
import re

import click
import pytest

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.cli.option import ELSEWHERE, similar
from shufflenet_mlflow.cli.train import USUAL, train
from tests.support.command_line import Invoke
from tests.test_settings import commands

LONG = [words for words, command in commands().items() if getattr(command, "usual", ())]
SCREEN = 55
"""Lines of a terminal on a laptop."""


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", text, re.MULTILINE))


def names_of(command: click.Command) -> set[str]:
    return {max(parameter.opts, key=len) for parameter in command.params if isinstance(parameter, click.Option)}


def test_the_long_ones_are_known() -> None:
    assert {"train", "tune", "eval"} <= set(LONG)
    assert len(USUAL) == 20
    assert set(USUAL) <= {parameter.name for parameter in train.params}


@pytest.mark.parametrize("words", LONG)
def test_help_fits_a_screen(words: str, shufflenet: Invoke) -> None:
    command = commands()[words]
    brief = shufflenet(*words.split(), "--help").stdout
    lines = brief.rstrip("\n").split("\n")
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 80
    assert "…" not in brief  # no text is cut in the middle of a sentence
    usual = {max(parameter.opts, key=len) for parameter in command.params if parameter.name in command.usual}  # type: ignore[attr-defined]
    assert len(usual) == len(command.usual)  # type: ignore[attr-defined]
    shown = options_in(brief)
    assert usual <= shown
    assert {"--config", "--help-all", "--help", "--debug"} <= shown
    whole = shufflenet(*words.split(), "--help-all")
    assert whole.exit_code == 0
    assert options_in(whole.stdout) == names_of(command) | {"--help"}
    [count] = re.findall(r"^(\d+) more options", brief, re.MULTILINE)
    assert int(count) == len(options_in(whole.stdout) - shown)


@pytest.mark.parametrize("words", [words for words in commands() if words and words not in LONG])
def test_short_help_is_whole(words: str, shufflenet: Invoke) -> None:
    text = shufflenet(*words.split(), "--help").stdout
    assert names_of(commands()[words]) <= options_in(text)
    assert "--help-all" not in text


# ---------------------------------------------------------------- suggestions


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--batchsize", ["--batch-size"]),
        ("--batch", ["--batch-size"]),
        ("--trian-dir", ["--train-dir"]),
        ("--epoch", ["--epochs"]),
        ("--save-intervall", ["--save-interval"]),
        ("--learning-rate", ["--lr"]),
        ("--imgsz", ["--input-size"]),
        ("--log-interval", ["--display-interval"]),
        ("--keep-first", []),
        ("--test-interval", []),
        ("--data-check", []),
        ("--x", []),
        ("--min-lr", []),
    ],
)
def test_suggestions(typed: str, meant: list[str], shufflenet: Invoke) -> None:
    result = shufflenet("train", typed, 1)
    assert (result.exit_code, result.stdout) == (2, "")
    named = re.findall(r"--[a-z-]+", result.stderr.partition("Try")[0].replace(typed, "", 1))
    assert named == meant


def test_groups_suggest_as_commands_do(shufflenet: Invoke) -> None:
    for words in (["tune"], ["runs"], []):
        said = shufflenet(*words, "--verbos").stderr.replace("'", "")  # click 8.3 has no quotation marks here
        assert "Did you mean --verbose?" in said
        assert "Did you mean" not in shufflenet(*words, "--log-interval" if not words else "--test-interval").stderr


def test_slips_of_the_keyboard_are_recognised() -> None:
    """Each option with two letters exchanged is answered with itself, and first."""
    draw = random.Random(0)
    names = sorted(names_of(train))
    for name in names:
        places = [place for place in range(2, len(name) - 1) if "-" not in name[place : place + 2]]
        place = draw.choice(places)
        slip = f"{name[:place]}{name[place + 1]}{name[place]}{name[place + 2 :]}"
        if len(name) > 8 and slip not in names:
            assert similar(slip, names, prefix="--")[:1] == [name], slip


def test_names_of_other_programs_lead_to_options() -> None:
    known = {name.removeprefix("--") for name in names_of(train)}
    assert set(ELSEWHERE.values()) <= known
    assert not ELSEWHERE.keys() & {name.removeprefix("--") for name in names_of(main)}
