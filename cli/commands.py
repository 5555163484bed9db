"""Common behaviour of the commands: help in sections, checks before work begins, one line per error, exit statuses."""

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from shufflenet_mlflow.config import EXCLUSIONS
from shufflenet_mlflow.errors import PeerFailedError, ShuffleNetError
from shufflenet_mlflow.runtime.signals import EXIT_BASE, StopRequested

from .errors import UsageError
from .option import DEBUG, ERROR_PRINTED, Option
from .settings import drop_weaker, note_sources, sources, warn_of_unknown_variables

SIGINT = 2
LONGEST_LINE = 2000
"""Most characters of an error: a file can hold names of any length."""


def _write_sections(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options under the titles of their sections, in the order of their declaration."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None and isinstance(parameter, click.Option):
            section = parameter.section if isinstance(parameter, Option) else None
            sections.setdefault(section or "Options", []).append(record)
    sections["Options"] = sections.pop("Options", [])  # last
    for title, records in sections.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


class Command(click.Command):
    """A command with its options in sections, whose values are checked before anything heavy is imported."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_sections(self, ctx, formatter)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ShuffleNetError for a value or a combination that cannot work."""
        from shufflenet_mlflow.workflows.options import check_request

        check_request(options)

    def invoke(self, ctx: click.Context) -> Any:
        note_sources(ctx)
        for pair in EXCLUSIONS:
            drop_weaker(ctx, pair.first, pair.second)
        self.check(ctx.params)
        _set_up_logging()
        return super().invoke(ctx)


class TrainingCommand(Command):
    """A command with the options of training."""

    def check(self, options: Mapping[str, Any]) -> None:
        from shufflenet_mlflow.workflows.options import check_training

        check_training(options)


def _set_up_logging() -> None:
    from .console import setup_logging

    setup_logging()


class Group(click.Group):
    """A group of commands; a mistyped name is answered with suggestions."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_sections(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        note_sources(ctx)
        if self.invoke_without_command:
            from shufflenet_mlflow.workflows.options import check_request

            check_request(ctx.params)
            _set_up_logging()
        return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            near = get_close_matches(name, self.commands, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self.list_commands(ctx))}"
            raise UsageError(f"there is no command {name!r}; {hint}", ctx, code="unknown-command")
        return super().resolve_command(ctx, args)


class Main(Group):
    """The whole command line; it ends with the documented exit statuses."""

    as_json = False
    """Whether to print errors as JSON on stdout, too."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **named: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **named)
        words = list(sys.argv[1:] if args is None else args)
        self.as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        try:
            status = super().main(args, standalone_mode=False, **named)
        except click.ClickException as error:
            if self.as_json and not isinstance(error, NoArgsIsHelpError):
                _print_json_error(getattr(error, "code", "usage"), error.format_message())
            _show_usage_error(error)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("Stopped by SIGINT.", err=True)
            sys.exit(EXIT_BASE + SIGINT)
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            # The reader, such as `head`, has closed the pipe; what is left in the buffer has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        warn_of_unknown_variables(self)
        try:
            return super().invoke(ctx)
        except PeerFailedError as error:  # the first process of the job says what it was
            sys.exit(error.exit_status)
        except ShuffleNetError as error:
            if self.as_json and ERROR_PRINTED not in ctx.meta:
                _print_json_error(error.code, str(error))
            _end(ctx, error)
        except StopRequested as stop:
            if os.environ.get("RANK", "0") == "0":
                click.echo(f"Stopped by {stop}.", err=True)
            sys.exit(stop.exit_status)
        except KeyboardInterrupt:
            click.echo("Stopped by SIGINT.", err=True)
            sys.exit(EXIT_BASE + SIGINT)


def _end(ctx: click.Context, error: ShuffleNetError) -> NoReturn:
    from shufflenet_mlflow.tracking.redaction import redact

    if ctx.meta.get(DEBUG):
        click.echo(redact(traceback.format_exc()), err=True, nl=False)
    else:
        click.echo(f"Error: {_one_line(redact(_with_sources(str(error))))}", err=True)
    sys.exit(error.exit_status)


def _print_json_error(code: str, message: str) -> None:
    """Print the error as JSON on stdout, unless another process of the job, or its next attempt, prints a document."""
    from shufflenet_mlflow.runtime.launchers import is_last_attempt
    from shufflenet_mlflow.tracking.redaction import redact

    if os.environ.get("RANK", "0") != "0" or not is_last_attempt():
        return
    click.echo(json.dumps({"error": {"code": code, "message": redact(message)}}))


def _with_sources(text: str) -> str:
    """Return the message, with the source of each option in it that was not typed."""
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    return text + "".join(f" ({option} is from {source})" for option, source in sources().items() if option in named)


def _show_usage_error(error: click.ClickException) -> None:
    """Print the error and where to read more, in two lines instead of click's four."""
    if isinstance(error, NoArgsIsHelpError) or not isinstance(error, click.UsageError):
        error.show()
        return
    click.echo(f"Error: {_one_line(error.format_message())}", err=True)
    if error.ctx is not None:
        click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"
