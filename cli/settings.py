"""Options from a file (`--config`) and from the environment (`SHUFFLENET_…`).

The command line comes first, then the environment, then the file.
"""

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from .errors import BadParameter
from .option import PREFIX, Option, similar, source_of, spelling
from .say import say

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = "shufflenet_mlflow.sources"
"""Option, as `--batch-size`, -> the variable or file that its value is from; only of options that were not typed."""

PRECEDENCE = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)

OTHER_VARIABLES = ("SHUFFLENET_CACHE_DIR", "SHUFFLENET_CONFIG")
"""Read by the library, and by every command that takes a file."""

LARGEST_FILE = 1 << 16
"""Bytes of a file of options."""
MOST_DOTS = 64
"""Dots on a line of it: `scales` has 20 numbers."""
MOST_BITS = 1024
"""Bits of a whole number: no option takes a larger one, and Python refuses to print very long ones."""
LONGEST_SHOWN = 80
"""Characters of a value in a message."""


def read_config(ctx: click.Context, path: Path) -> dict[str, Any]:
    """Read the values of this command's options from a TOML file, or a JSON one such as a run's `config.json`.

    Returns:
        Parameter's name -> value, as text: they are checked as if they had been typed.

    Raises:
        click.BadParameter: the file cannot be read, or holds a key that no command knows, or a value of a wrong type.
    """
    own = _by_key(ctx.command)
    known: dict[str, list[Option]] = {}
    for command in _commands(ctx.find_root().command):
        for key, option in _by_key(command).items():
            known.setdefault(key, []).append(option)
    values = {}
    for written, value in _read(path).items():
        key, where = written.replace("-", "_"), f"{path}: {written}"
        if key not in known:
            _refuse_key(written, value, path, list(known))
        elif value is not None:  # null: not given
            _check_type(value, [own[key]] if key in own else known[key], where)
            if key in own:
                values[str(own[key].name)] = _as_texts(value) if own[key].multiple else _as_text(value)
    return values


def _refuse_key(written: str, value: Any, path: Path, known: list[str]) -> NoReturn:
    if isinstance(value, dict):
        raise BadParameter(f"{path}: {written} is a table; options stand at the top of the file", code="value-is-table")
    near = similar(written.replace("-", "_")[:LONGEST_SHOWN], known)
    hint = f"did you mean {near[0]}?" if near else "keys are options without their hyphens, as batch_size"
    raise BadParameter(f"{path}: there is no option {_shown(written)}; {hint}", code="unknown-key")


def _read(path: Path) -> dict[str, Any]:
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = _bytes_of(path).decode("utf-8")
        document = json.loads(text) if kind == "JSON" else _parse_toml(text)
    except OSError as error:
        raise BadParameter(f"cannot read {str(path)!r}: {error.strerror}", code="config-file-unreadable") from error
    except RecursionError as error:
        raise BadParameter(
            f"{path} is not {kind} of options: it is nested too deeply", code="config-file-deep"
        ) from error
    except ValueError as error:
        raise BadParameter(f"{path} is not {kind}: {error}", code="config-file-syntax") from error
    if not isinstance(document, dict):
        raise BadParameter(
            f"{path} holds no options; it must hold an object, as a run's config.json does",
            code="config-file-not-object",
        )
    return document


def _bytes_of(path: Path) -> bytes:
    """Return a regular file's content; never block on a pipe of that name."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise BadParameter(f"{str(path)!r} is no regular file; save the options to one", code="config-file-special")
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise BadParameter(
            f"{str(path)!r} is larger than {LARGEST_FILE} bytes; a file of options takes a few hundred",
            code="config-file-large",
        )
    return content


def _parse_toml(text: str) -> dict[str, Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MOST_DOTS:  # tomllib takes minutes for keys of thousands of parts
            raise ValueError(f"line {number} holds more than {MOST_DOTS} dots")
    document: dict[str, Any] = tomllib.loads(text)
    return document


def _as_text(value: Any) -> str:
    """Return a value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_texts(value: Any) -> list[str]:
    """Return the values of a repeatable option as they would be typed."""
    return [_as_text(item) for item in value] if isinstance(value, list) else [_as_text(value)]


def _check_type(value: Any, options: Sequence[Option], where: str) -> None:
    """Refuse a value that none of these options takes, before text hides its type.

    Text may stand for any value, as in the environment; what is left to check is checked as if it had been typed.
    """
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and "\0" in text for text in texts):
        raise BadParameter(f"{where} (={_shown(value)}) holds a null character", code="null-character")
    if any(isinstance(text, str) and not _can_be_typed(text) for text in texts):
        raise BadParameter(f"{where} (={_shown(value)}) holds half a character", code="half-character")
    if not any(_fits(value, option) for option in options):
        wanted = " or ".join(dict.fromkeys(map(_wanted, options)))
        raise BadParameter(f"{where} (={_shown(value)}) must be {wanted}", code="value-kind")


def _can_be_typed(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _fits(value: Any, option: Option) -> bool:
    if isinstance(value, str):
        return True
    if isinstance(value, list):
        return option.is_list and all(isinstance(item, str) or _is_number(item) for item in value)
    if isinstance(option.type, click.types.BoolParamType):
        return isinstance(value, bool)
    if isinstance(option.type, click.types.IntParamType):
        return _is_number(value) and isinstance(value, int)
    return isinstance(option.type, click.types.FloatParamType) and _is_number(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() <= MOST_BITS
    return isinstance(value, float)


def _wanted(option: Option) -> str:
    if isinstance(option.type, click.types.BoolParamType):
        return "true or false"
    if isinstance(option.type, click.types.IntParamType):
        return "a whole number"
    if isinstance(option.type, click.types.FloatParamType):
        return "a number"
    return "a list, or text with commas" if option.is_list else "text"


def _shown(value: Any) -> str:
    """Return a value for a message: as in the file, and not all of a long one."""
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in lists in lists
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


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


def drop_standing(ctx: click.Context, names: Iterable[str]) -> None:
    """Drop the values of options that nobody has typed: they stand in the environment, or in a file."""
    for name in names:
        if name in ctx.params and ctx.get_parameter_source(name) in PRECEDENCE[1:]:
            ctx.params[name] = None


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
        near = similar(name, known, prefix=PREFIX)
        say(
            f"Warning: {name} is set, and is no option's variable" + (f"; did you mean {near[0]}?" if near else ""),
            err=True,
        )
