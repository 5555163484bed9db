"""An option that can also be set in a file and in the environment, and where its value is from."""

from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

DEBUG = "shufflenet_mlflow.debug"
VERBOSITY = "shufflenet_mlflow.verbosity"
CONFIG = "shufflenet_mlflow.config"
"""Keys of a context's `meta`: whether to show tracebacks; `verbose` or `quiet`; the file of options."""
ERROR_PRINTED = "shufflenet_mlflow.error_printed"
"""Key of a context's `meta`: the command's JSON document already holds the error that it ends with."""

PREFIX = "SHUFFLENET_"
"""Prefix of the environment variables that set options."""


class Option(click.Option):
    """An option that can also be set in the environment, as `SHUFFLENET_BATCH_SIZE`, and in a file, as `batch_size`.

    Empty text means not given: `mlflow run` passes every parameter of an entry point, those that were not set as empty
    text; on Kubernetes as a pair of quotes, since no shell removes them there.

    Args:
        section: title under which the help shows it.
        in_files: whether a file may hold it.
        is_list: whether a file may hold a list instead of text with commas.
    """

    def __init__(
        self,
        *arguments: Any,
        section: str | None = None,
        in_files: bool = True,
        is_list: bool = False,
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section
        self.in_files = in_files
        self.is_list = is_list
        self.envvar = PREFIX + spelling(self).upper().replace("-", "_")

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        if opts.get(str(self.name)) in ("", "''"):
            opts = {name: value for name, value in opts.items() if name != self.name}
        return super().consume_value(ctx, opts)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return None if value in ("", "''") else super().type_cast_value(ctx, value)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        source = source_of(ctx, self) if ctx is not None else None
        hint = super().get_error_hint(ctx)
        return hint if source is None else f"{hint} (from {source})"


def spelling(parameter: click.Parameter) -> str:
    """Return the long name of an option, without the leading hyphens."""
    return max(parameter.opts, key=len).lstrip("-")


def source_of(ctx: click.Context, parameter: click.Parameter) -> str | None:
    """Return the variable or the file that a value is from; None if it was typed, or not given."""
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if source is ParameterSource.DEFAULT_MAP:
        return str(ctx.meta[CONFIG])
    return None
