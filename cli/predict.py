"""`shufflenet predict`."""

from typing import Any

import click

from shufflenet_mlflow.config import MOST_WORKERS

from .commands import Command
from .options import (
    bad_image_option,
    cache_dir_option,
    common_options,
    config_option,
    device_option,
    json_option,
    network_options,
    option,
    options,
    ref_argument,
    tracking_uri_option,
)


@click.command(cls=Command)
@ref_argument
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@option("--top", type=click.IntRange(min=1), metavar="N", help="Labels per image.  [default: 5]")
@network_options
@bad_image_option
@options(
    device_option,
    option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Images at a time.  [default: 64]"),
    option(
        "--workers",
        type=click.IntRange(0, MOST_WORKERS),
        metavar="N",
        help="Decoding processes.  [default: none for a few images]",
    ),
    section="Machine",
)
@tracking_uri_option
@cache_dir_option
@config_option
@json_option
@common_options
def predict(ref: str, images: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Say what the checkpoint REF takes each IMAGE for: files, or folders of them.

    REF is what `shufflenet eval` takes.

    \b
    Examples:
      shufflenet predict 01234567 cat.jpg dog.png
      shufflenet predict models:/pets@champion photos --top 1 --json
    """
    from shufflenet_mlflow.jobs.prediction import PredictRequest, run_prediction

    from .console import ConsoleReporter
    from .stopping import stop_flag
    from .tables import print_json, printable

    given = {name: value for name, value in values.items() if value is not None}
    with stop_flag() as stop:
        found = run_prediction(PredictRequest(ref, images=images, **given), reporter=ConsoleReporter(), stop=stop)
        if as_json:
            print_json([prediction.to_dict() for prediction in found])
            return
        for prediction in found:
            ranked = "  ".join(f"{label} {probability:.4f}" for label, probability in prediction.top)
            click.echo(f"{printable(prediction.path)}  {ranked}")
