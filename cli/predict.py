"""`shufflenet predict`."""

import sys
from contextlib import closing
from io import BytesIO
from typing import Any, BinaryIO

import click

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE

from .commands import Command
from .errors import UsageError
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


@click.command(cls=Command, usual=("model", "device", "top", "tracking_uri"))
@ref_argument
@click.argument("images", metavar="IMAGE...", nargs=-1, type=click.Path())
@network_options
@bad_image_option
@options(
    device_option,
    option("--batch-size", type=int, metavar="N", help=f"Images per batch.  [default: {DEFAULT_BATCH_SIZE}]"),
    option(
        "--workers",
        type=int,
        metavar="N",
        help="Processes that decode images.  [default: none for a few images]",
    ),
    section="Machine",
)
@tracking_uri_option
@cache_dir_option
@option("--top", type=int, metavar="N", help="Labels per image.  [default: 5]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json"]),
    help="Output format; table and csv are printed image by image.  [default: table]",
)
@config_option
@json_option
@common_options
def predict(ref: str, images: tuple[str, ...], format_: str | None, as_json: bool, **values: Any) -> None:
    """Predict the classes of images.

    REF is a checkpoint or an exported file as for `shufflenet eval`; a run ID alone means the run's best. IMAGE is a
    file, a folder (with all images below it), a table (.csv or .parquet, with a column path), a quoted pattern (**
    matches folders of any depth), or - for standard input: one image, or paths, one per line or separated by NUL.

    \b
    Examples:
      shufflenet predict 01234567 cat.jpg dog.png
      shufflenet predict models:/pets@champion photos --format csv > labels.csv
      shufflenet predict models:/pets@champion 'photos/**/*.jpg' --json
      find photos -name '*.jpg' -print0 | shufflenet predict 01234567 -
      curl -s https://example.org/cat.jpg | shufflenet predict 01234567 -
    """
    if not images:
        raise UsageError(
            "Missing argument 'IMAGE...': a file, a folder, a pattern, or - for standard input.", code="no-images-named"
        )
    if as_json and format_ not in (None, "json"):
        raise UsageError(f"--json and --format {format_} exclude each other.", code="json-and-format")
    from shufflenet_mlflow.data.folder import by_suffix
    from shufflenet_mlflow.data.pictures import find_pictures

    pictures = find_pictures(images, _stdin)  # before torch is imported: a wrong path is named at once

    from .predictions import WRITERS, Output

    out = Output()
    from shufflenet_mlflow.workflows.predict import PredictRequest, run_prediction

    from .console import ConsoleReporter
    from .stopping import stop_flag

    given = {name: value for name, value in values.items() if value is not None}
    with stop_flag() as stop:
        reporter = ConsoleReporter()
        if pictures.left_out:
            reporter.note(f"left out {by_suffix(pictures.left_out)}")
        found = run_prediction(PredictRequest(ref, **given), pictures, reporter=reporter, stop=stop)
        with closing(found.batches):  # the processes that read images, too, if nobody takes what is printed
            WRITERS["json" if as_json else format_ or "table"](found, pictures, out)


def _stdin() -> BinaryIO:
    """Return standard input; an empty one if the process has none."""
    return BytesIO() if sys.stdin is None else sys.stdin.buffer
