"""Options that several commands share, as decorators."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shufflenet_mlflow.config import ON_BAD_IMAGE

from .completing import NETWORK, REFERENCE, RUN, Folder
from .errors import UsageError
from .option import CONFIG, DEBUG, VERBOSITY, Option, source_of, spelling
from .settings import read_config

Command = TypeVar("Command", bound=Callable[..., Any])


def option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """Like `click.option`, for an `Option`."""
    return click.option(*names, cls=Option, **attributes)


def flag(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option without a value, or with true or false, as `mlflow run` passes it; None if it is not given."""
    return option(*names, is_flag=False, flag_value="true", type=bool, metavar="", **attributes)


def options(*decorators: Callable[[Command], Command], section: str | None = None) -> Callable[[Command], Command]:
    """Combine several options into one decorator, in their order.

    Args:
        section: title under which the help shows those without one.
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


# ---------------------------------------------------------------- options of every command


def _set_debug(ctx: click.Context, _parameter: click.Parameter, value: bool | None) -> None:
    if value:
        ctx.meta[DEBUG] = True


def _set_verbosity(ctx: click.Context, parameter: click.Parameter, value: bool | None) -> None:
    if not value:
        return
    if ctx.meta.get(VERBOSITY, spelling(parameter)) != spelling(parameter):
        both = [(place, known) for place in (ctx, ctx.parent) if place for known in place.command.params]
        sources = [
            (f"--{spelling(known)}", source_of(place, known))
            for place, known in both
            if spelling(known) in ("verbose", "quiet")
        ]
        origin = "".join(f" ({name} is from {source})" for name, source in sources if source is not None)
        raise UsageError(
            f"--verbose and --quiet exclude each other; give one of them{origin}", ctx, code="verbose-and-quiet"
        )
    ctx.meta[VERBOSITY] = spelling(parameter)


def verbosity() -> str | None:
    """Return `verbose`, `quiet`, or None."""
    ctx = click.get_current_context(silent=True)
    return None if ctx is None else ctx.meta.get(VERBOSITY)


def _switch(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option without a value: unlike after a `flag`, an argument of the command may follow it."""
    return option(*names, is_flag=True, expose_value=False, in_files=False, **attributes)


common_options = options(
    _switch("-v", "--verbose", callback=_set_verbosity, help="Show more: files, uploads, where options are from."),
    _switch("-q", "--quiet", callback=_set_verbosity, help="Show only results, warnings and errors."),
    _switch("--debug", callback=_set_debug, help="Show the traceback of an error."),
)
"""Options of every command."""

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on stdout.",
)


def _use_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
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
    help="File of options: TOML (batch_size = 128) or a run's config.json.  [default: none]",
)

# ---------------------------------------------------------------- options of several commands

ref_argument = click.argument("ref", metavar="REF", type=REFERENCE)
run_argument = click.argument("run", metavar="RUN", type=RUN)

tracking_uri_option = option(
    "--tracking-uri",
    metavar="URI",
    section="MLflow",
    help="MLflow tracking store.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db]",
)

cache_dir_option = option(
    "--cache-dir",
    type=Folder(path_type=Path),
    metavar="DIR",
    section="MLflow",
    help="Folder for fetched checkpoints.  [default: the user's cache folder]",
)


def bad_image_option_with(default: str) -> Callable[[Command], Command]:
    """Return `--on-bad-image`, with what its help says of the default."""
    return option(
        "--on-bad-image",
        type=click.Choice(ON_BAD_IMAGE),
        section="Data",
        help=f"Stop at an unreadable image, or skip it.  [default: {default}]",
    )


bad_image_option = bad_image_option_with("fail")

device_option = option(
    "--device", metavar="DEVICE", section="Machine", help="auto, cpu, mps, cuda or cuda:N.  [default: auto]"
)

architecture_options = options(
    option(
        "--choices",
        metavar="LIST",
        is_list=True,
        help="Branch (0-3) of each of shufflenet_oneshot's 20 units.  [default: published]",
    ),
    option(
        "--scales",
        metavar="LIST",
        is_list=True,
        help="Relative width of each unit, such as 0.6,1.4,…  [default: published]",
    ),
    section="Network",
)

keep_options = options(
    option("--keep-last", type=int, metavar="N", help="Keep the newest N checkpoints.  [default: all]"),
    option(
        "--keep-best", type=int, metavar="K", help="Keep the K with the highest validation accuracy.  [default: all]"
    ),
    option("--keep-every", type=int, metavar="M", help="Keep the checkpoints of every M-th iteration.  [default: all]"),
    section="Checkpoints",
)

division_options = options(
    option(
        "--val-fraction",
        type=float,
        metavar="X",
        help="Share of --train-dir that is for validation, if there is no --val-dir.  [default: 0.2]",
    ),
    option(
        "--group-by",
        metavar="PATTERN",
        help="Regular expression for the paths: images in which it finds the same stay together.  [default: none]",
    ),
    section="Data",
)

mean_image_option = option(
    "--mean-image",
    metavar="FILE",
    section="Data",
    help="Mean image to subtract, .npy or OpenCV .xml; only shufflenet_v2_large.  [default: a mean per channel]",
)

network_options = options(
    option(
        "--model",
        metavar="NAME",
        type=NETWORK,
        help="Network, if the file does not name it.  [default: the one it names]",
    ),
    architecture_options,
    option(
        "--input-size",
        type=int,
        metavar="PIXELS",
        help="Input size, a multiple of 32.  [default: the checkpoint's, or 224]",
    ),
    mean_image_option,
    section="Network",
)
"""Options of commands that take a checkpoint."""
