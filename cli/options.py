"""What several commands share: option types, and the options themselves as decorators."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from .completing import NETWORK, REFERENCE, RUN, Folder
from .errors import UsageError

DEBUG = "shufflenet_mlflow.debug"
VERBOSITY = "shufflenet_mlflow.verbosity"
LEVELS_OF_SPEECH = ("verbose", "quiet")
CONFIG = "shufflenet_mlflow.config"
ERROR_PRINTED = "shufflenet_mlflow.error_printed"
"""Set where a command's JSON document holds the error that it ends with."""
PREFIX = "SHUFFLENET_"
"""Of the environment variables that stand for options."""

Command = TypeVar("Command", bound=Callable[..., Any])


class Option(click.Option):
    """An option that can also be set in the environment, as `SHUFFLENET_BATCH_SIZE`, and in a file, as `batch_size`.

    Empty text means that it was not given: `mlflow run` passes every parameter of an entry point, and the ones that
    were not set as empty text; on Kubernetes as a pair of quotes, since no shell removes them there.

    Args:
        section: title under which the help shows it.
        in_files: whether a file may hold it.
    """

    def __init__(self, *arguments: Any, section: str | None = None, in_files: bool = True, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section
        self.in_files = in_files
        self.envvar = PREFIX + spelling(self).upper().replace("-", "_")

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        if opts.get(str(self.name)) in ("", "''"):
            opts = {name: value for name, value in opts.items() if name != self.name}
        return super().consume_value(ctx, opts)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return None if value in ("", "''") else super().type_cast_value(ctx, value)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        from .settings import source_of

        source = source_of(ctx, self) if ctx is not None else None
        hint = super().get_error_hint(ctx)
        return hint if source is None else f"{hint} (from {source})"


def spelling(parameter: click.Parameter) -> str:
    """The long name of an option, without its hyphens in front."""
    return max(parameter.opts, key=len).lstrip("-")


def option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """`click.option` of the class above."""
    return click.option(*names, cls=Option, **attributes)


def flag(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option without a value, or with one of true and false, as `mlflow run` passes it; None if it is not given."""
    return option(*names, is_flag=False, flag_value="true", type=bool, metavar="", **attributes)


def options(*decorators: Callable[[Command], Command], section: str | None = None) -> Callable[[Command], Command]:
    """Several options as one decorator, in their order.

    Args:
        section: title under which the help shows those that have none.
    """

    def decorate(command: Command) -> Command:
        before = len(getattr(command, "__click_params__", ()))
        for decorator in reversed(decorators):
            command = decorator(command)
        for added in command.__click_params__[before:]:  # type: ignore[attr-defined]
            if isinstance(added, Option):
                added.section = added.section or section
        return command

    return decorate


# ---------------------------------------------------------------- of every command


def _set_debug(ctx: click.Context, _parameter: click.Parameter, value: bool | None) -> None:
    if value:
        ctx.meta[DEBUG] = True


def _set_verbosity(ctx: click.Context, parameter: click.Parameter, value: bool | None) -> None:
    if not value:
        return
    if ctx.meta.get(VERBOSITY, spelling(parameter)) != spelling(parameter):
        from .settings import source_of

        places = [(place, known) for place in (ctx, ctx.parent) if place for known in place.command.params]
        sources = [
            (f"--{spelling(known)}", source_of(place, known))
            for place, known in places
            if spelling(known) in LEVELS_OF_SPEECH
        ]
        origin = "".join(f" ({name} is from {source})" for name, source in sources if source is not None)
        raise UsageError(
            f"--verbose and --quiet exclude each other; give one of them{origin}", ctx, code="verbose-and-quiet"
        )
    ctx.meta[VERBOSITY] = spelling(parameter)


def verbosity() -> str | None:
    """`verbose`, `quiet`, or None."""
    ctx = click.get_current_context(silent=True)
    return None if ctx is None else ctx.meta.get(VERBOSITY)


def _switch(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """Without a value, unlike `flag`: an argument of the command may stand behind it."""
    return option(*names, is_flag=True, expose_value=False, in_files=False, **attributes)


common_options = options(
    _switch("-v", "--verbose", callback=_set_verbosity, help="Say more: files, uploads, where options are from."),
    _switch("-q", "--quiet", callback=_set_verbosity, help="Say less: results, warnings and errors only."),
    _switch("--debug", callback=_set_debug, help="Show the traceback of an error."),
)
"""Of every command."""

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on stdout, and nothing else there.",
)


def _use_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    from .settings import read_config

    ctx.meta[CONFIG] = path
    ctx.default_map = read_config(ctx, path)


config_option = option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    in_files=False,
    callback=_use_config,
    help="Options from a TOML file, batch_size = 128, or a run's config.json.  [default: none]",
)

# ---------------------------------------------------------------- of several commands

ref_argument = click.argument("ref", metavar="REF", type=REFERENCE)
run_argument = click.argument("run", metavar="RUN", type=RUN)

tracking_uri_option = option(
    "--tracking-uri",
    metavar="URI",
    section="MLflow",
    help="Where runs are kept.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db]",
)

cache_dir_option = option(
    "--cache-dir",
    type=Folder(path_type=Path),
    metavar="DIR",
    section="MLflow",
    help="Where fetched checkpoints are kept.  [default: the user's cache folder]",
)

bad_image_option = option(
    "--on-bad-image",
    type=click.Choice(["fail", "skip"]),
    section="Data",
    help="What an unreadable file means.  [default: fail]",
)

device_option = option(
    "--device", metavar="DEVICE", section="Machine", help="auto, cpu, mps, cuda or cuda:N.  [default: auto]"
)

architecture_options = options(
    option("--choices", metavar="LIST", help="Branches of shufflenet_oneshot's 20 units, 0-3.  [default: published]"),
    option("--scales", metavar="LIST", help="Inner widths of its 20 units, such as 0.6,1.4,…  [default: published]"),
    section="Network",
)

keep_options = options(
    option("--keep-last", type=int, metavar="N", help="Keep the newest N checkpoints.  [default: all]"),
    option("--keep-best", type=int, metavar="K", help="Keep the K with the best validation accuracy.  [default: all]"),
    option("--keep-every", type=int, metavar="M", help="Keep those at multiples of M iterations.  [default: all]"),
    section="Checkpoints",
)

mean_image_option = option(
    "--mean-image",
    metavar="FILE",
    section="Data",
    help="Mean image to subtract, .npy or OpenCV .xml; shufflenet_v2_large.  [default: a mean per channel]",
)

network_options = options(
    option("--model", metavar="NAME", type=NETWORK, help="For a file that does not name it.  [default: what it names]"),
    architecture_options,
    option(
        "--input-size", type=int, metavar="PIXELS", help="A multiple of 32.  [default: the checkpoint's own, or 224]"
    ),
    mean_image_option,
    section="Network",
)
"""Of commands that take a checkpoint."""
