"""`shufflenet recipes`."""

import click

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE, DEFAULT_MODEL
from shufflenet_mlflow.config import option as spelled

from .commands import Command
from .completing import NETWORK
from .options import common_options, config_option, json_option, option


@click.command(cls=Command)
@option(
    "--model",
    metavar="NAME",
    type=NETWORK,
    section="Network",
    help=f"Network to show the recipes for.  [default: {DEFAULT_MODEL}]",
)
@option(
    "--batch-size",
    type=int,
    metavar="N",
    section="Training",
    help=f"Images per iteration, to which the learning rate is scaled.  [default: {DEFAULT_BATCH_SIZE}]",
)
@config_option
@json_option
@common_options
def recipes(model: str | None, batch_size: int | None, as_json: bool) -> None:
    """Show the recipes of training in full: the value of every option that they decide.

    `shufflenet train --recipe NAME` uses one; an option that is given overrides its value.

    \b
    Examples:
      shufflenet recipes
      shufflenet recipes --model shufflenet_v2_large --batch-size 256
      shufflenet recipes --json
    """
    from shufflenet_mlflow.training.recipe import DECIDED, NAMED_RECIPES, recipe_options

    from .console import next_steps
    from .say import say
    from .tables import print_json, print_table

    model, batch_size = model or DEFAULT_MODEL, batch_size or DEFAULT_BATCH_SIZE
    values = {name: recipe_options(name, model, batch_size) for name in NAMED_RECIPES}
    if as_json:
        print_json({"model": model, "batch_size": batch_size, "recipes": values})
        return
    for name, recipe in NAMED_RECIPES.items():
        say(f"{name}: {recipe.summary}")
    say("", f"For {model} and batches of {batch_size} images:", "")
    print_table(
        ("option", *values),
        [(spelled(name), *(_shown(recipe[name]) for recipe in values.values())) for name in DECIDED],
    )
    next_steps("shufflenet train --recipe NAME --train-dir DIR --val-dir DIR")


def _shown(value: object) -> str:
    """Return a value as it would be typed; a dash for none."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
