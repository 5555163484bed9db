"""`shufflenet bench`."""

from typing import Any

import click

from shufflenet_mlflow.config import AMP_DTYPES

from .commands import TrainingCommand
from .completing import NETWORK, Folder
from .options import (
    architecture_options,
    cache_dir_option,
    common_options,
    config_option,
    device_option,
    flag,
    json_option,
    option,
    options,
)


@click.command(cls=TrainingCommand)
@options(
    option(
        "--model",
        metavar="NAME",
        type=NETWORK,
        help="Network; `shufflenet models` lists them.  [default: shufflenet_v2_x0_5]",
    ),
    architecture_options,
    option("--num-classes", type=int, metavar="N", help="Width of the classifier.  [default: the number of classes]"),
    option(
        "--input-size", type=int, metavar="PIXELS", help="Input size, a multiple of 32.  [default: 224; digits: 64]"
    ),
    section="Network",
)
@option(
    "--train-dir", metavar="DIR", type=Folder(), section="Data", help="Images, one folder per class.  [default: digits]"
)
@option("--batch-size", type=int, metavar="N", section="Training", help="Images per iteration.  [default: 64]")
@options(
    device_option,
    option("--workers", type=int, metavar="N", help="Processes that decode images.  [default: as in training]"),
    option("--amp", type=click.Choice(list(AMP_DTYPES)), help="Mixed precision.  [default: off]"),
    flag("--compile", help="Use torch.compile."),
    section="Machine",
)
@option("--iterations", type=int, metavar="N", help="Iterations to measure, of each part.  [default: 20]")
@option(
    "--tracking-uri",
    metavar="URI",
    section="MLflow",
    help="MLflow store to measure with.  [default: a temporary one]",
)
@cache_dir_option
@config_option
@json_option
@common_options
def bench(as_json: bool, **values: Any) -> None:
    """Measure where training spends its time on this machine.

    Names the bottleneck of an iteration: data, step, checkpoint or tracking.

    Nothing is kept. With --tracking-uri it makes a run there, and deletes it and its checkpoints afterwards.

    \b
    Examples:
      shufflenet bench
      shufflenet bench --model shufflenet_v2_x1_0 --train-dir pets/train
      shufflenet bench --train-dir pets/train --device cuda --amp bf16 --json
    """
    iterations, tracking_uri, cache_dir = (values.pop(name) for name in ("iterations", "tracking_uri", "cache_dir"))
    given = {name: value for name, value in values.items() if value is not None}

    from .stopping import stop_flag

    with stop_flag("stopping after this iteration; again to stop at once") as stop:
        from shufflenet_mlflow.workflows.bench import BenchRequest, described, run_bench

        from .console import ConsoleReporter, next_steps
        from .tables import print_json, print_table

        request = BenchRequest(given, iterations or BenchRequest.iterations, tracking_uri, cache_dir)
        result = run_bench(request, reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json(result.to_dict())
        return
    for line in described(result):
        click.echo(line)
    click.echo()
    rows = [[part.name, f"{part.milliseconds:.2f}", part.detail] for part in result.parts]
    whole = ["iteration", f"{result.milliseconds:.2f}", f"{result.images_per_second:.0f} images/s in total"]
    print_table(["", "ms", ""], [*rows, whole])
    click.echo(f"\nThe first step took {result.first_step_seconds:.1f} s.")
    click.echo(f"Bottleneck: {result.bottleneck}. What would help: {result.advice}.")
    next_steps("shufflenet train with the same options")
