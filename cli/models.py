"""`shufflenet models`."""

import math

import click

from .commands import Command
from .options import common_options, json_option


@click.command(cls=Command)
@json_option
@common_options
def models(as_json: bool) -> None:
    """List the networks, with size and published errors.

    MACs are for 224 pixels, errors are on ImageNet; input is the preprocessing that the published weights expect.

    \b
    Examples:
      shufflenet models
      shufflenet models --json
    """
    from shufflenet_mlflow.models.catalog import VARIANTS

    from .console import next_steps
    from .tables import print_json, print_table

    if as_json:
        print_json(
            [
                {
                    "name": variant.name,
                    "family": variant.family,
                    "parameters": variant.parameters,
                    "macs": variant.macs,
                    "top1_error": variant.top1_error,
                    "top5_error": variant.top5_error,
                    "preprocess": variant.preprocess,
                }
                for variant in VARIANTS.values()
            ]
        )
        return
    rows = [
        (
            variant.name,
            variant.family,
            f"{variant.parameters / 1e6:.2f}",
            f"{variant.macs / 1e6:,.0f}",
            _percent(variant.top1_error),
            _percent(variant.top5_error),
            variant.preprocess,
        )
        for variant in VARIANTS.values()
    ]
    titles = ("name", "family", "params (M)", "MACs (M)", "top-1 error %", "top-5 error %", "input")
    print_table(titles, rows, spare=("input", "top-5 error %", "family"))
    next_steps("shufflenet train --model NAME --train-dir DIR --val-dir DIR")


def _percent(error: float) -> str:
    """Return a dash if nothing was published."""
    return "-" if math.isnan(error) else f"{error:.2f}"
