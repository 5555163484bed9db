"""Options from a file (`--config`) and from the environment (`SHUFFLENET_…`).

The command line comes first, then the environment, then the file.
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
from .option import PREFIX, Option, source_of, spelling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = "shufflenet_mlflow.sources"
"""Option, as `--batch-size`, -> the variable or file that its value is from; only of options that were not typed."""

PRECEDENCE = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)

OTHER_VARIABLES = ("SHUFFLENET_CACHE_DIR", "SHUFFLENET_CONFIG")
"""Read by the library, and by every command that takes a file."""


def read_config(ctx: click.Context, path: Path) -> dict[str, Any]:
    """Read the values of this command's options from a TOML file, or a JSON one such as a run's `config.json`.

    Returns:
        Parameter's name -> value, as text: they are checked as if they had been typed.

    Raises:
        click.BadParameter: the file cannot be read, or holds a key that no command knows, or a value of a wrong type.
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
            _check_type(value, own[key], f"{path}: {written}")
            values[str(own[key].name)] = text
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise BadParameter(f"cannot read {str(path)!r}: {error.strerror}", code="config-file-unreadable") from error
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise BadParameter(f"{path} is not {kind}: {error}", code="config-file-syntax") from error
    if not isinstance(document, dict):
        raise BadParameter(
            f"{path} holds no options; it must hold an object, as a run's config.json does",
            code="config-file-not-object",
        )
    return document


def _as_text(value: Any, where: str) -> str | None:
    """Return a value as it would be typed; None for null."""
    if value is None:
        return None
    if isinstance(value, str) and "\0" in value:
        raise BadParameter(f"{where} (={value!r}) holds a null character", code="null-character")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        raise BadParameter(f"{where} is a table; options stand at the top of the file", code="value-is-table")
    raise BadParameter(f"{where} is neither text, a number, true or false, nor a list of them", code="value-type")


def _check_type(value: Any, option: Option, where: str) -> None:
    """Refuse a value that text would hide: a list or a number where text is expected, a number for true or false.

    Text may stand for any value, as in the environment; what is left to check is checked as if it had been typed.
    """
    if isinstance(value, str) or (isinstance(value, list) and option.is_list):
        return
    if isinstance(option.type, click.types.BoolParamType):
        expected = None if isinstance(value, bool) else "true or false"
    elif isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)):
        expected = "a number" if isinstance(value, list) else None
    else:
        expected = "a list, or text with commas" if option.is_list else "text"
    if expected is not None:
        raise BadParameter(f"{where} (={value}) must be {expected}", code="value-kind")


def _commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for one in command.commands.values():
            yield from _commands(one)


def _by_key(command: click.Command) -> dict[str, Option]:
    """Return the options of this command by their key in a file."""
    return {
        spelling(option).replace("-", "_"): option
        for option in command.params
        if isinstance(option, Option) and option.in_files
    }


def note_sources(ctx: click.Context) -> None:
    """Remember, for messages, where the values are from that were not typed."""
    found: MutableMapping[str, str] = ctx.meta.setdefault(SOURCES, {})
    for option in ctx.command.params:
        source = source_of(ctx, option)
        if source is not None:
            found[f"--{spelling(option)}"] = source


def sources() -> dict[str, str]:
    """Return where the options of the running command are from: `--batch-size` -> variable or file."""
    ctx = click.get_current_context(silent=True)
    return {} if ctx is None else dict(ctx.meta.get(SOURCES, {}))


def drop_weaker(ctx: click.Context, first: str, second: str) -> None:
    """Drop the value of one of two options that exclude each other, if the other one's source takes precedence."""
    ranks = {}
    for name in (first, second):
        source = ctx.get_parameter_source(name)
        if source in PRECEDENCE and ctx.params.get(name) is not None:
            ranks[name] = PRECEDENCE.index(source)
    if len(set(ranks.values())) == 2:
        ctx.params[max(ranks, key=lambda name: ranks[name])] = None


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
