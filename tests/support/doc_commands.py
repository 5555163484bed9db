"""The commands in a console block of the documentation, and whether `shufflenet` would accept them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a console block as words, without comments, assignments and redirections.

    A command that is followed by `||` is left out: it is shown because it fails.
    """
    buffer = ""
    for line in text.replace("\\\n", " ").splitlines():
        buffer += line + "\n"
        lexer = shlex.shlex(buffer, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation that goes on
            continue
        buffer = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if command and word != "||":
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)
    assert not buffer, f"a quotation does not end: {buffer}"


def arguments_of(command: list[str]) -> list[str] | None:
    """Return the arguments that a command passes to `shufflenet`, or None if it is another command."""
    first = Path(command[0]).name
    if first == "shufflenet":
        return command[1:]
    if first in ("python", "torchrun") and "shufflenet_mlflow" in command:
        return command[command.index("shufflenet_mlflow") + 1 :]
    for script in ("slurm.sh", "torchrun.sh"):  # they pass what they are given on to `shufflenet train`
        for position, word in enumerate(command):
            if word.endswith(f"clusters/{script}"):
                return ["train", *command[position + 1 :]]
    return None


def check_arguments(main: click.Group, arguments: list[str]) -> None:
    """Parse arguments of `shufflenet` as click does, but run no callback: nothing is read, nothing has to exist.

    Raises:
        click.UsageError: no such command or option, a value that it does not take, or an argument too few or too many.
    """
    command: click.Command = main
    context = click.Context(main, info_name="shufflenet")
    while True:
        values, rest, _ = command.make_parser(context).parse_args(list(arguments))
        for parameter in command.params:
            value: Any = values.get(parameter.name or "")
            given = isinstance(value, str | tuple | list) and value != ()  # else None, (), or a mark of click's
            if parameter.required and not given:
                raise click.MissingParameter(ctx=context, param=parameter)
            if given and not isinstance(parameter.type, click.Path | click.File):
                parameter.type_cast_value(context, value)
        if not isinstance(command, click.Group):
            if rest:
                raise click.UsageError(f"{command.name} takes no {' '.join(rest)}", context)
            return
        if not rest:
            return
        name, inner, arguments = command.resolve_command(context, rest)
        assert inner is not None
        context = click.Context(inner, info_name=name, parent=context)
        command = inner
