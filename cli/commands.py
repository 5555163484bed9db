"""Common behaviour of the commands: help in sections, checks before work begins, one line per error, exit statuses."""

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from shufflenet_mlflow.config import EXCLUSIONS, FIELDS
from shufflenet_mlflow.errors import PeerFailedError, ShuffleNetError
from shufflenet_mlflow.runtime.signals import EXIT_BASE, StopRequested
from shufflenet_mlflow.runtime.text import visible

from .errors import UsageError
from .help import WithHelp
from .option import DEBUG, ERROR_PRINTED, NEXT_STEP
from .say import say
from .settings import drop_standing, drop_weaker, note_sources, sources, warn_of_unknown_variables
from .stopping import leave, let_signals_end, let_signals_raise
from .streams import OutputError, guard

SIGINT = 2
LONGEST_LINE = 2000
"""Most characters of an error: a file can hold names of any length."""


class Command(WithHelp):
    """A command with its options in sections, whose values are checked before anything heavy is imported."""

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


class SearchCommand(Command):
    """`search`."""

    def check(self, options: Mapping[str, Any]) -> None:
        from shufflenet_mlflow.workflows.options import check_searching

        check_searching(options)


def _set_up_logging() -> None:
    from .console import setup_logging

    setup_logging()


class Group(WithHelp, click.Group):
    """A group of commands; a mistyped name is answered with suggestions."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
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


class StudyGroup(Group):
    """`tune`: a command with the options of training, and commands for studies below it."""

    def invoke(self, ctx: click.Context) -> Any:
        note_sources(ctx)
        words = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        if not words:
            from shufflenet_mlflow.workflows.options import check_tuning

            if not ctx.params.get("study"):
                raise UsageError(
                    "--study is missing; it names the study to begin, or to go on with", ctx, code="study-missing"
                )
            for pair in EXCLUSIONS:
                drop_weaker(ctx, pair.first, pair.second)
            if not ctx.params.get("param"):  # the study has them already
                drop_standing(ctx, (*FIELDS, "epochs"))
            check_tuning(ctx.params)
        return super().invoke(ctx)


class Main(Group):
    """The whole command line; it ends with the documented exit statuses."""

    as_json = False
    """Whether to print errors as JSON on stdout, too."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **named: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **named)
        words = list(sys.argv[1:] if args is None else args)
        self.as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        if args is not None:
            sys.exit(self._run(args, **named))
        # This process is the command.
        guard()
        let_signals_raise()
        status = self._run(args, **named)
        let_signals_end()
        return leave(status)

    def _run(self, args: Sequence[str] | None, **named: Any) -> int:
        """Run a command, print its error, and return its exit status."""
        try:
            status = super().main(args, standalone_mode=False, **named)
        except click.ClickException as error:
            if self.as_json and not isinstance(error, NoArgsIsHelpError):
                _print_json_error(getattr(error, "code", "usage"), error.format_message())
            _show_usage_error(error)
            return error.exit_code
        except (click.Abort, KeyboardInterrupt):
            say("Stopped by SIGINT.", err=True)
            return EXIT_BASE + SIGINT
        except OutputError as error:
            # A reader such as `head` has had enough of lines; half a document is of no use to anyone.
            if self.as_json or error.errno != errno.EPIPE:
                say(f"Error: standard output cannot be written to: {error.strerror}", err=True)
            return 1
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        return status if isinstance(status, int) else 0

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
            if (os.environ.get("RANK") or "0") == "0":
                say(f"Stopped by {stop}.", err=True)
            sys.exit(stop.exit_status)
        except KeyboardInterrupt:
            say("Stopped by SIGINT.", err=True)
            sys.exit(EXIT_BASE + SIGINT)
        except EOFError as error:  # which click takes for Ctrl-D at a prompt, and thus for Ctrl-C
            raise RuntimeError("a stream ended too early") from error


def _end(ctx: click.Context, error: ShuffleNetError) -> NoReturn:
    from shufflenet_mlflow.tracking.redaction import redact

    if ctx.meta.get(DEBUG):
        say(*redact(traceback.format_exc()).rstrip("\n").split("\n"), err=True)
    else:
        say(f"Error: {_one_line(redact(_with_sources(str(error))))}", err=True)
    if NEXT_STEP in ctx.meta:
        from .console import next_steps

        next_steps(ctx.meta[NEXT_STEP])
    sys.exit(error.exit_status)


def _print_json_error(code: str, message: str) -> None:
    """Print the error as JSON on stdout, unless another process of the job, or its next attempt, prints a document."""
    from shufflenet_mlflow.runtime.launchers import is_last_attempt
    from shufflenet_mlflow.tracking.redaction import redact

    if (os.environ.get("RANK") or "0") != "0" or not is_last_attempt():
        return
    with suppress(OutputError):  # the line on stderr says what happened
        say(json.dumps({"error": {"code": code, "message": redact(message)}}))


def _with_sources(text: str) -> str:
    """Return the message, with the source of each option in it that was not typed."""
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    return text + "".join(f" ({option} is from {source})" for option, source in sources().items() if option in named)


def _show_usage_error(error: click.ClickException) -> None:
    """Print the error and where to read more, in two lines instead of click's four."""
    if isinstance(error, NoArgsIsHelpError) or not isinstance(error, click.UsageError):
        error.show()
        return
    say(f"Error: {_one_line(error.format_message())}", err=True)
    if error.ctx is not None:
        say(f"Try '{error.ctx.command_path} --help'.", err=True)


def _one_line(text: str) -> str:
    line = visible(" ".join(text.split()))
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"
