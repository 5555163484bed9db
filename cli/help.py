"""Help in sections: `--help` shows the options that people use, on one screen; `--help-all` shows every one."""

import re
from collections.abc import Sequence
from typing import Any

import click

from .errors import UsageError
from .option import Option, similar
from .say import say

ALL_OPTIONS = "shufflenet_mlflow.all_options"
"""Key of a context's `meta`: the help is to show every option."""

_NAMES = 23
"""Columns for the names of options, in the help that fits a screen."""

Sections = dict[str, list[tuple[str, str]]]
"""Title -> names of an option, and its text."""


class WithHelp(click.Command):
    """A command with its options in sections, and with suggestions for mistyped ones.

    Args:
        usual: parameters of the options that `--help` shows; without it, it shows all.
    """

    def __init__(self, *arguments: Any, usual: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.usual = tuple(usual)
        if usual:
            more = click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all)
            more.help = "Show every option, and exit."
            self.params.append(more)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the titles of their sections, in the order of their declaration."""
        sections, hidden = self._sections(ctx)
        if not self.usual or ALL_OPTIONS in ctx.meta:
            for title, records in sections.items():
                with formatter.section(title):
                    formatter.write_dl(records)
            return
        formatter.write_paragraph()
        for title, records in sections.items():
            formatter.write(f"{title}:\n")
            for names, text in records:
                formatter.write(f"  {names:{_NAMES}} {_in_one_line(text, formatter.width - _NAMES - 3)}\n")
        formatter.write(f"{hidden} more options, and defaults in full: {ctx.command_path} --help-all\n")

    def _sections(self, ctx: click.Context) -> tuple[Sections, int]:
        """Return the options to show, and how many others there are."""
        sections: Sections = {}
        hidden = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or not isinstance(parameter, click.Option):
                continue
            section = parameter.section if isinstance(parameter, Option) else None
            if self.usual and ALL_OPTIONS not in ctx.meta:
                if section is not None and str(parameter.name) not in self.usual:
                    hidden += 1
                    continue
                record = _short(parameter, record[0]), record[1]
            sections.setdefault(section or "Options", []).append(record)
        sections["Options"] = sections.pop("Options", [])  # last
        return {title: records for title, records in sections.items() if records}, hidden

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:  # click suggests whatever shares the hyphens and a few letters
            known = [name for parameter in self.params for name in parameter.opts]
            better = click.NoSuchOption(error.option_name, ctx=ctx)
            better.possibilities = similar(error.option_name, known, prefix="--")  # type: ignore[misc]
            raise better from error
        except click.UsageError as error:
            folders = any("--train-dir" in parameter.opts for parameter in self.params)
            if folders and error.message.startswith("Got unexpected extra argument"):
                hint = "folders of images are named with --train-dir and --val-dir"
                raise UsageError(f"{error.message.rstrip('.')}: {hint}", ctx, code="argument-unexpected") from error
            raise


def _show_all(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[ALL_OPTIONS] = True
        say(*ctx.get_help().splitlines())
        ctx.exit()


def _short(parameter: click.Option, names: str) -> str:
    """Return an option's names; a list of values that is too long for its column becomes a word."""
    if len(names) <= _NAMES or " " not in names:
        return names
    return f"{names.partition(' ')[0]} {'NAME' if isinstance(parameter.type, click.Choice) else 'VALUE'}"


def _in_one_line(text: str, width: int) -> str:
    """Return as much of an option's text as fits: with its default, without it, or only its first clauses."""
    explanation, bracket, default = " ".join(text.split()).partition(" [default: ")
    shown = f"{explanation} [{default}" if bracket else explanation
    if len(shown) <= width:
        return shown
    while len(explanation) > width and (ends := [match.start() for match in re.finditer("[;,:] ", explanation)]):
        explanation = f"{explanation[: ends[-1]]}."
    return explanation if len(explanation) <= width else f"{explanation[: width - 1].rstrip()}…"
