"""`shufflenet models`."""

from typing import Any

import click

from .options import debug_option, json_option


@click.command()
@json_option
@debug_option
def models(as_json: bool) -> None:
    """List the networks: size, work at 224 pixels, published ImageNet errors."""
    from shufflenet_mlflow.models import VARIANTS
    from shufflenet_mlflow.models.cost import model_cost

    rows: list[dict[str, Any]] = []
    for variant in VARIANTS.values():
        cost = model_cost(variant.name)
        rows.append(
            {
                "name": variant.name,
                "family": variant.family,
                "parameters": cost.parameters,
                "macs": cost.macs,
                "top1_error": variant.top1_error,
                "top5_error": variant.top5_error,
                "preprocess": variant.preprocess,
            }
        )
    if as_json:
        from .console import print_json

        print_json(rows)
        return
    click.echo(f"{'name':<22}{'family':<9}{'parameters':>12}{'MACs':>8}{'top-1 err.':>12}{'top-5 err.':>12}  input")
    for row in rows:
        click.echo(
            f"{row['name']:<22}{row['family']:<9}{row['parameters'] / 1e6:>10.2f} M"
            f"{row['macs'] / 1e6:>6.0f} M{row['top1_error']:>10.1f} %{row['top5_error']:>10.1f} %"
            f"  {row['preprocess']}"
        )
