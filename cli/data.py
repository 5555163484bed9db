"""`shufflenet data`."""

from pathlib import Path
from shlex import quote

import click

from shufflenet_mlflow.config import check_rule

from .commands import Group
from .completing import Folder
from .options import bad_image_option, common_options, config_option, json_option, option


@click.group(cls=Group)
def data() -> None:
    """Write data sets and mean images.

    \b
    Examples:
      shufflenet data digits digits
      shufflenet data mean pets/train --output pets-mean.npy
    """


@data.command()
@click.argument("folder", metavar="DIR", type=Folder(path_type=Path))
@json_option
@common_options
def digits(folder: Path, as_json: bool) -> None:
    """Write the bundled handwritten digits to DIR, as DIR/train and DIR/val.

    They are 1,797 images of ten classes from scikit-learn, a fifth of them for validation. DIR must be new or empty.

    \b
    Example:
      shufflenet data digits digits
    """
    from shufflenet_mlflow.data.digits import write_digits
    from shufflenet_mlflow.data.folder import list_images

    from .console import next_steps
    from .tables import print_json

    write_digits(folder)
    counts = {part: len(list_images(folder / part)) for part in ("train", "val")}
    if as_json:
        print_json({"directory": str(folder), **counts})
        return
    click.echo(f"{folder}: {counts['train']} images in train, {counts['val']} in val")
    train, val = (quote(f"{folder}/{part}") for part in ("train", "val"))
    next_steps(f"shufflenet train --train-dir {train} --val-dir {val} --input-size 64")


@data.command()
@click.argument("folder", metavar="DIR", type=Folder(path_type=Path))
@option("--output", type=click.Path(path_type=Path), help="File to write, .npy or .xml.  [default: mean.npy]")
@option("--input-size", type=int, metavar="PIXELS", help="Input size, a multiple of 32.  [default: 224]")
@option(
    "--workers",
    type=int,
    metavar="N",
    help="Processes that decode images.  [default: one per core, at most 16]",
)
@bad_image_option
@config_option
@json_option
@common_options
def mean(
    folder: Path,
    output: Path | None,
    input_size: int | None,
    workers: int | None,
    on_bad_image: str | None,
    as_json: bool,
) -> None:
    """Compute the mean image of DIR, one folder per class, for shufflenet_v2_large.

    \b
    Example:
      shufflenet data mean pets/train --output pets-mean.npy
      shufflenet train --config pets.toml --mean-image pets-mean.npy
    """
    output = output or Path("mean.npy")
    check_rule("mean_image", output, field="output")
    from shufflenet_mlflow.workflows.data import run_mean

    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    with stop_flag() as stop:
        summary = run_mean(
            folder,
            output,
            input_size=input_size,
            workers=workers,
            skip_bad=on_bad_image == "skip",
            reporter=ConsoleReporter(),
            stop=stop,
        )
    if as_json:
        print_json(summary.to_dict())
        return
    blue, green, red = summary.mean_BGR
    click.echo(f"{output}: mean of {summary.n} images, {summary.input_size}x{summary.input_size} pixels")
    click.echo(f"per channel: blue {blue:.2f}, green {green:.2f}, red {red:.2f}")
    next_steps(
        f"shufflenet train --model shufflenet_v2_large --mean-image {quote(str(output))} "
        f"--train-dir {quote(str(folder))} --val-dir DIR"
    )
