"""What several commands share: option types, and the options themselves as decorators."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

DEBUG = "shufflenet_mlflow.debug"

Command = TypeVar("Command", bound=Callable[..., Any])


class Option(click.Option):
    """An option for which empty text means that it was not given.

    `mlflow run` passes every parameter of an entry point, and the ones that were not set as empty text; on Kubernetes
    as a pair of quotes, since no shell removes them there.
    """

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return None if value in ("", "''") else super().type_cast_value(ctx, value)


def option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """`click.option` of the class above."""
    return click.option(*names, cls=Option, **attributes)


def flag(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option without a value, or with one of true and false, as `mlflow run` passes it; None if it is not given."""
    return option(*names, is_flag=False, flag_value="true", type=bool, metavar="", **attributes)


def _set_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True
        logging.getLogger("shufflenet_mlflow").setLevel(logging.DEBUG)


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show the traceback of an error.",
)

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on stdout, and nothing else there.",
)

tracking_uri_option = option(
    "--tracking-uri",
    metavar="URI",
    help="Where runs are kept.  [default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db]",
)

cache_dir_option = option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Where fetched checkpoints are kept.  [default: SHUFFLENET_CACHE_DIR, or the user's cache folder]",
)

bad_image_option = option(
    "--on-bad-image",
    type=click.Choice(["fail", "skip"]),
    help="What an unreadable file means.  [default: fail]",
)

device_option = option("--device", metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:N.  [default: auto]")

architecture_options = (
    option("--choices", metavar="LIST", help="Branches of shufflenet_oneshot's 20 units, 0-3.  [default: published]"),
    option("--scales", metavar="LIST", help="Inner widths of its 20 units, such as 0.6,1.4,…  [default: published]"),
)

keep_options = (
    option("--keep-last", type=int, metavar="N", help="Keep the newest N checkpoints."),
    option("--keep-best", type=int, metavar="K", help="Keep the K with the highest validation accuracy."),
    option("--keep-every", type=int, metavar="M", help="Keep those at multiples of M iterations."),
)

mean_image_option = option(
    "--mean-image",
    metavar="FILE",
    help="Mean image to subtract, .npy or OpenCV .xml; shufflenet_v2_large.  [default: a mean per channel]",
)


network_options = (
    option("--model", metavar="NAME", help="Network, for a file that does not name it."),
    *architecture_options,
    option("--input-size", type=int, help="Pixels, a multiple of 32.  [default: the checkpoint's own, or 224]"),
    mean_image_option,
)
"""Of commands that take a checkpoint."""


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in their order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate
