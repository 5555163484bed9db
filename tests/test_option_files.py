"""Hostile files and variables that set options: one line at once, with file, key, value and the type that is wanted.

As in `test_option_rules`, the commands run where torch and MLflow cannot be imported. The options are those that
`train` has, whatever they are.
"""

import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from shufflenet_mlflow.cli.option import Option
from shufflenet_mlflow.cli.settings import LARGEST_FILE, MOST_DOTS
from shufflenet_mlflow.config import RULES
from tests.test_option_rules import Case, name_of, run
from tests.test_settings import commands

OPTIONS = [option for option in commands()["train"].params if isinstance(option, Option) and option.in_files]

FILE = "{outside}/options.toml"


def kind_of(option: Option) -> str:
    if option.is_list:
        return "list"
    kinds = {click.types.BoolParamType: "bool", click.types.IntParamType: "int", click.types.FloatParamType: "float"}
    return next((kind for parameter, kind in kinds.items() if isinstance(option.type, parameter)), "text")


WANTED = {
    "bool": "must be true or false",
    "int": "must be a whole number",
    "float": "must be a number",
    "list": "must be a list, or text with commas",
    "text": "must be text",
}

TOML: dict[str, tuple[str, tuple[str, ...]]] = {
    "[16]": ("[16]", ("list",)),
    "[[16]]": ("[[16]]", ()),
    "[true]": ("[True]", ()),
    "[{a = 1}]": ("[{'a': 1}]", ()),
    "7": ("7", ("int", "float")),
    "1.5": ("1.5", ("float",)),
    "16.0": ("16.0", ("float",)),
    "1e3": ("1000.0", ("float",)),
    "true": ("true", ("bool",)),
    "nan": ("nan", ("float",)),
    "inf": ("inf", ("float",)),
    "-inf": ("-inf", ("float",)),
    "9" * 20: ("9" * 20, ("int", "float")),
    "0x" + "f" * 5000: ("a int too long to show", ()),
    "{a = 1}": ("{'a': 1}", ()),
    "{a = {b = [1]}}": ("{'a': {'b': [1]}}", ()),
    "1979-05-27": ("1979-05-27", ()),
    "1979-05-27T07:32:00Z": ("1979-05-27 07:32:00+00:00", ()),
    "07:32:00": ("07:32:00", ()),
    '"a\\u0000b"': (r"'a\x00b'", ()),
}
"""Value in TOML -> the value in the message, and the kinds of option that take it."""


def case_of(option: Option, text: str, shown: str, kinds: tuple[str, ...]) -> Case | None:
    """Return the case of a value; None if the option takes it."""
    key, kind = name_of(option)[2:].replace("-", "_"), kind_of(option)
    words, files = ["train", "--config", FILE], {"options.toml": f"{key} = {text}\n"}
    if kind not in kinds:
        null = "\\u0000" in text
        return Case(words, ("options.toml", key, shown, "null character" if null else WANTED[kind]), files=files)
    if kind in ("int", "float") and key in RULES:
        number = float(text) if kind == "float" else int(text)
        if RULES[key].holds(number):
            return None
        return Case(words, ("options.toml", f"{name_of(option)} (=", "must be "), files=files, shows=(str(number),))
    return None if kind in ("bool", "list") else Case(words, ("no rule holds this value",), files=files)


@pytest.mark.parametrize("text", TOML, ids=lambda text: text[:24])
def test_values_of_a_wrong_type(text: str) -> None:
    cases = [case for option in OPTIONS if (case := case_of(option, text, *TOML[text])) is not None]
    assert len(OPTIONS) > 30
    assert len(cases) > 2
    assert not (wrong := run(cases)), "\n".join(wrong)


def test_values_in_variables() -> None:
    cases = []
    for option in OPTIONS:
        kind, name = kind_of(option), name_of(option)
        texts = {
            "bool": ("[16]", "7", "nan"),
            "int": ("[16]", "1.5", "nan", "inf", "true", "9" * 20, "9" * 5000, "-1", "1979-05-27"),
            "float": ("[16]", "nan", "inf", "-inf", "true", "-1", "0x10"),
            "list": ("[true]", "nan", "{a = 1}"),
        }.get(kind, ())
        for text in texts:
            more = ["--model", "shufflenet_oneshot"] if kind == "list" else []
            says = (name[2:],) if kind == "list" else (name, str(option.envvar))
            cases.append(Case(["train", *more], says, variables={str(option.envvar): text}))
            if kind != "bool" or text != "7":
                cases.append(Case(["train", *more, f"{name}={text}"], (name[2:],)))
    assert not (wrong := run(cases)), "\n".join(wrong)


# ---------------------------------------------------------------- files


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"lr = 1\n#")
        file.truncate(100 << 20)


HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no text": ("o.toml", lambda path: path.write_bytes(b"lr = 1\n# \xff\xfe"), "is not TOML: 'utf-8' codec"),
    "no text, JSON": ("o.json", lambda path: path.write_bytes(b'{"lr": "\xff"}'), "is not JSON: 'utf-8' codec"),
    "UTF-16": ("o.toml", lambda path: path.write_bytes("lr = 1".encode("utf-16")), "is not TOML"),
    "lists in lists": ("o.toml", lambda path: path.write_text("lr = " + "[" * 50_000), "nested too deeply"),
    "tables in tables": ("o.toml", lambda path: path.write_text("lr = " + "{a = " * 10_000), "nested too deeply"),
    "JSON in JSON": ("o.json", lambda path: path.write_text('{"lr": ' + "[" * 60_000), "nested too deeply"),
    "a deep key": (
        "o.toml",
        lambda path: path.write_text(".".join("a" * 30_000) + " = 1"),
        f"more than {MOST_DOTS} dots",
    ),
    "deep keys": (
        "o.toml",
        lambda path: path.write_text("".join(f"[b{line}.{'.'.join('a' * 60)}]\n" for line in range(500))),
        "is a table",
    ),
    "half a character": ("o.json", lambda path: path.write_text('{"run_name": "\\ud800"}'), "half a character"),
    "a long key": ("o.toml", lambda path: path.write_text("k" * 60_000 + " = 1"), "there is no option 'kkkk"),
    "a key that controls": ("o.toml", lambda path: path.write_text('"a\\u001b[31m\\nb" = 1'), "there is no option"),
    "large": ("o.toml", _large, f"larger than {LARGEST_FILE} bytes"),
    "a pipe": ("o.toml", os.mkfifo, "no regular file"),
    "a folder": ("o.toml", Path.mkdir, "Is a directory"),
    "no end": ("o.toml", lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "itself": ("o.toml", lambda path: path.symlink_to(path.name), "cannot read"),
    "nothing": ("o.toml", lambda path: None, "No such file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(what: str, tmp_path: Path) -> None:
    name, make, says = HOSTILE[what]
    path = tmp_path / name
    make(path)
    cases = [
        Case(["train", "--config", str(path)], (str(path), says)),
        Case(["runs"], (str(path), says), variables={"SHUFFLENET_CONFIG": str(path)}),
    ]
    assert not (wrong := run(cases)), "\n".join(wrong)
