"""`shufflenet models`."""

import click

from .options import debug_option, json_option


@click.command()
@json_option
@debug_option
def models(as_json: bool) -> None:
    """List the networks: size, work at 224 pixels, published ImageNet errors, input."""
    from shufflenet_mlflow.models import VARIANTS

    if as_json:
        from .console import print_json

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
    click.echo(f"{'name':<32}{'family':<13}{'parameters':>10}{'MACs':>10}{'top-1 error':>13}{'top-5 error':>13}  input")
    for variant in VARIANTS.values():
        click.echo(
            f"{variant.name:<32}{variant.family:<13}{variant.parameters / 1e6:>8.2f} M{variant.macs / 1e6:>8,.0f} M"
            f"{variant.top1_error:>11.2f} %{variant.top5_error:>11.2f} %  {variant.preprocess}"
        )
