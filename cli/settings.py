"""Where options stand besides the command: in a file (`--config`) and in the environment (`SHUFFLENET_…`).

The command comes first, then the environment, then the file.
"""

import json
import os
import sys
from collections.abc import Iterator, MutableMapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .errors import BadParameter
from .options import CONFIG, PREFIX, Option, spelling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = "shufflenet_mlflow.sources"
"""Option, as `--batch-size`, -> where its value is from; only those that the command itself does not have."""

PRECEDENCE = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)

OTHER_VARIABLES = ("SHUFFLENET_CACHE_DIR", "SHUFFLENET_CONFIG")
"""Read by the library, and by every command that takes a file."""


def read_config(ctx: click.Context, path: Path) -> dict[str, Any]:
    """The values of this command's options in a TOML file, or in a JSON one such as a run's `config.json`.

    Returns:
        Parameter's name -> value, as text: they are checked as if they had been typed.

    Raises:
        click.BadParameter: it cannot be read, or holds what is no option of any command.
    """
    known = {key for command in _commands(ctx.find_root().command) for key in _by_key(command)}
    own = _by_key(ctx.command)
    values = {}
    for written, value in _read(path).items():
        key = written.replace("-", "_")
        if key not in known and not isinstance(value, dict):
            near = get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "keys are options without their hyphens, as batch_size"
            raise BadParameter(f"{path}: there is no option {written!r}; {hint}", code="unknown-key")
        text = _as_text(value, f"{path}: {written}")
        if key in own and text is not None:
            values[str(own[key].name)] = text
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise BadParameter(f"cannot read {str(path)!r}: {error.strerror}", code="config-file-unreadable") from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise BadParameter(f"{path} is not {kind}: {error}", code="config-file-syntax") from error
    if not isinstance(document, dict):
        raise BadParameter(
            f"{path} holds no options; it is to be an object, as a run's config.json is", code="config-file-not-object"
        )
    return document


def _as_text(value: Any, where: str) -> str | None:
    """A value as it would be typed; None for null."""
    if value is None:
        return None
    if isinstance(value, str) and "\0" in value:
        raise BadParameter(
            f"{where} (={value!r}) holds a null character; no text that can be typed has one", code="null-character"
        )
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        raise BadParameter(f"{where} is a table; options stand at the top of the file", code="value-is-table")
    raise BadParameter(f"{where} is neither text, a number, true or false, nor a list of them", code="value-type")


def _commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for one in command.commands.values():
            yield from _commands(one)


def _by_key(command: click.Command) -> dict[str, Option]:
    """Key in a file -> the option of this command."""
    return {
        spelling(option).replace("-", "_"): option
        for option in command.params
        if isinstance(option, Option) and option.in_files
    }


def note_sources(ctx: click.Context) -> None:
    """Remember where the values are from that the command itself does not have, for messages."""
    found: MutableMapping[str, str] = ctx.meta.setdefault(SOURCES, {})
    for option in ctx.command.params:
        source = source_of(ctx, option)
        if source is not None:
            found[f"--{spelling(option)}"] = source


def source_of(ctx: click.Context, parameter: click.Parameter) -> str | None:
    """The variable or the file that a value is from; None for one that was typed, or not given."""
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if source is ParameterSource.DEFAULT_MAP:
        return str(ctx.meta[CONFIG])
    return None


def sources() -> dict[str, str]:
    """The same for all options of the command that runs: as `--batch-size` -> variable or file."""
    ctx = click.get_current_context(silent=True)
    return {} if ctx is None else dict(ctx.meta.get(SOURCES, {}))


def weaker_of(ctx: click.Context, first: str, second: str) -> str | None:
    """Which of two options that exclude each other does not count, since the other stands in a place that goes before;
    None if only one was given, or both in the same place."""
    sources = [ctx.get_parameter_source(name) for name in (first, second)]
    if not all(source in PRECEDENCE for source in sources) or sources[0] is sources[1]:
        return None
    return second if PRECEDENCE.index(sources[0]) < PRECEDENCE.index(sources[1]) else first


def warn_of_unknown_variables(main: click.Command) -> None:
    """Name variables that look like an option's and are none."""
    mine = [name for name in os.environ if name.startswith(PREFIX)]
    if not mine:
        return
    known = {*OTHER_VARIABLES}
    for command in _commands(main):
        known |= {str(option.envvar) for option in command.params if isinstance(option, Option)}
    for name in sorted(set(mine) - known):
        near = get_close_matches(name, known, n=1, cutoff=0.7)
        click.echo(
            f"Warning: {name} is set, and is no option's variable" + (f"; did you mean {near[0]}?" if near else ""),
            err=True,
        )
