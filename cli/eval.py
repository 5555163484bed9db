"""`shufflenet eval`."""

from typing import Any

import click

from .options import (
    architecture_options,
    bad_image_option,
    cache_dir_option,
    debug_option,
    device_option,
    json_option,
    mean_image_option,
    option,
    options,
    tracking_uri_option,
)


@click.command("eval")
@click.argument("ref")
@option("--val-dir", metavar="DIR", help="Images, a folder per class.  [default: the run's own]")
@option("--model", metavar="NAME", help="Network, for a file that does not name it.")
@options(*architecture_options)
@option("--input-size", type=int, help="Pixels, a multiple of 32.  [default: the checkpoint's own, or 224]")
@mean_image_option
@option("--batch-size", type=click.IntRange(min=1), help="Images at a time.  [default: the run's own]")
@option("--workers", type=click.IntRange(min=0), help="Decoding processes.  [default: the run's own]")
@device_option
@bad_image_option
@tracking_uri_option
@cache_dir_option
@json_option
@debug_option
def eval_(ref: str, as_json: bool, **values: Any) -> None:
    """Evaluate the checkpoint REF on an image folder.

    REF is a file, a folder of checkpoints, a run ID, runs:/ID, runs:/ID@best, runs:/ID@latest, runs:/ID@ITERS,
    models:/NAME@ALIAS or models:/NAME/VERSION.

    \b
    Examples:
      shufflenet eval 0123456789abcdef0123456789abcdef
      shufflenet eval runs:/0123456789abcdef0123456789abcdef@best --val-dir pets/test --json
      shufflenet eval ShuffleNetV2.1.0x.pth.tar --model shufflenet_v2_x1_0 --val-dir imagenet/val
    """
    from shufflenet_mlflow.jobs import EvalRequest, run_evaluation

    from .console import ConsoleReporter, print_json
    from .stopping import stop_flag

    given = {name: value for name, value in values.items() if value is not None}
    with stop_flag() as stop:
        summary = run_evaluation(EvalRequest(ref, **given), reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json(summary.to_dict())
        return
    result = summary.result
    click.echo(f"checkpoint  {summary.checkpoint}  ({summary.model}, iteration {summary.iters})")
    if summary.run_id:
        click.echo(f"run ID      {summary.run_id}")
    skipped = f", {result.skipped} unreadable left out" if result.skipped else ""
    click.echo(f"images      {result.n}{skipped}")
    click.echo(f"top1        {result.top1:.4f}")
    click.echo(f"top5        {result.top5:.4f}")
    click.echo(f"loss        {result.loss:.4f}")
