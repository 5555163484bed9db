"""`shufflenet bench`."""

from typing import Any

import click

from .options import (
    architecture_options,
    cache_dir_option,
    debug_option,
    device_option,
    flag,
    json_option,
    option,
    options,
)


@click.command()
@option("--model", metavar="NAME", help="Network.  [default: shufflenet_v2_x0_5]")
@options(*architecture_options)
@option("--train-dir", metavar="DIR", help="Images, one folder per class.  [default: the bundled digits]")
@option("--num-classes", type=int, help="Width of the classifier.  [default: classes in --train-dir]")
@option("--input-size", type=int, help="Pixels, a multiple of 32.  [default: 224; digits: 64]")
@option("--batch-size", type=int, help="Images per iteration.  [default: 64]")
@option("--amp", type=click.Choice(["off", "bf16", "fp16"]), help="Mixed precision.  [default: off]")
@flag("--compile", help="With torch.compile.")
@option("--workers", type=int, help="Decoding processes.  [default: as in training]")
@device_option
@option("--iterations", type=click.IntRange(min=1), help="To measure, of each part.  [default: 20]")
@option("--tracking-uri", metavar="URI", help="Store to measure with.  [default: an embedded one, for the occasion]")
@cache_dir_option
@json_option
@debug_option
def bench(as_json: bool, **values: Any) -> None:
    """Measure where an iteration of training spends its time on this machine, and name the bottleneck.

    Nothing is kept. With --tracking-uri a run is made there and deleted again, with its checkpoints.

    \b
    Examples:
      shufflenet bench
      shufflenet bench --model shufflenet_v2_x1_0 --train-dir pets/train --workers 8
      shufflenet bench --train-dir pets/train --device cuda --amp bf16 --json
    """
    iterations, tracking_uri, cache_dir = (values.pop(name) for name in ("iterations", "tracking_uri", "cache_dir"))
    given = {name: value for name, value in values.items() if value is not None}

    from .stopping import stop_flag

    with stop_flag("leaving after this iteration; once more leaves at once") as stop:
        from shufflenet_mlflow.jobs.benchmarking import BenchRequest, described, run_bench

        from .console import ConsoleReporter, print_json, print_table

        request = BenchRequest(given, iterations or BenchRequest.iterations, tracking_uri, cache_dir)
        result = run_bench(request, reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json(result.to_dict())
        return
    for line in described(result):
        click.echo(line)
    click.echo()
    rows = [[part.name, f"{part.milliseconds:.2f}", part.detail] for part in result.parts]
    whole = ["iteration", f"{result.milliseconds:.2f}", f"{result.images_per_second:.0f} images/s, all together"]
    print_table(["", "ms", ""], [*rows, whole])
    click.echo(f"\nThe first step took {result.first_step_seconds:.1f} s.")
    click.echo(f"Bottleneck: {result.bottleneck}. What would help: {result.advice}.")
