"""`shufflenet models`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .commands import Command
from .completing import NETWORK
from .options import common_options, json_option

if TYPE_CHECKING:
    from shufflenet_mlflow.models.entry_points import Registration


@click.command(cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...", type=NETWORK)
@json_option
@common_options
def models(names: tuple[str, ...], as_json: bool) -> None:
    """List the networks, or those named, with size and published errors.

    MACs are for 224 pixels, errors are on ImageNet; input is the preprocessing that the published weights expect.
    Networks that other packages register come last, with the package as their family; their size is counted if they
    are named, at their own input size.

    \b
    Examples:
      shufflenet models
      shufflenet models shufflenet_v2_x1_0 shufflenet_v2_x1_5
      shufflenet models --json
    """
    from .console import ConsoleReporter, next_steps
    from .tables import print_json, print_table

    rows, refused = _rows(names)
    for refusal in refused:
        ConsoleReporter().warn(refusal)
    if as_json:
        print_json(rows)
        return
    cells = [
        (
            row["name"],
            row["family"],
            *("-" if row[key] is None else form.format(row[key] / 1e6) for key, form in _SIZES.items()),
            *(_percent(row[key]) for key in ("top1_error", "top5_error")),
            row["preprocess"] or "-",
        )
        for row in rows
    ]
    titles = ("name", "family", "params (M)", "MACs (M)", "top-1 error %", "top-5 error %", "input")
    print_table(titles, cells, spare=("input", "top-5 error %", "family"))
    next_steps("shufflenet train --model NAME --train-dir DIR --val-dir DIR")


_SIZES = {"parameters": "{:.2f}", "macs": "{:,.0f}"}


def _rows(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each network, and what to say of entry points that are left out."""
    from shufflenet_mlflow.models.catalog import VARIANTS, Variant, find_network, refusal_of
    from shufflenet_mlflow.models.entry_points import registrations

    if names:
        found = [(name, find_network(name)) for name in names]
        return [_of_variant(net) if isinstance(net, Variant) else _counted(name, net) for name, net in found], []
    rows, refused = [_of_variant(variant) for variant in VARIANTS.values()], []
    for registration in registrations():
        refusal = refusal_of(registration)
        if refusal is None:
            rows.append(_of_registered(registration.name, registration))
        else:
            refused.append(refusal)
    return rows, refused


def _of_variant(variant: Any) -> dict[str, Any]:
    keys = ("name", "family", "parameters", "macs", "top1_error", "top5_error", "preprocess")
    return {key: getattr(variant, key) for key in keys}


def _of_registered(name: str, registration: "Registration", **known: Any) -> dict[str, Any]:
    row = dict.fromkeys(("parameters", "macs", "top1_error", "top5_error", "preprocess"))
    return {"name": name, "family": registration.package, **row, **known}


def _counted(name: str, registration: "Registration") -> dict[str, Any]:
    from shufflenet_mlflow.models.cost import model_cost
    from shufflenet_mlflow.models.spec import ModelSpec

    preprocess = ModelSpec.of(name).preprocess
    cost = model_cost(name, input_size=preprocess.input_size)
    mode = preprocess.mode if isinstance(preprocess.mode, str) else preprocess.settings.channels
    return _of_registered(name, registration, parameters=cost.parameters, macs=cost.macs, preprocess=mode)


def _percent(error: float | None) -> str:
    """Return a dash if nothing was published."""
    return "-" if error is None or math.isnan(error) else f"{error:.2f}"
