"""`shufflenet data`."""

from pathlib import Path

import click

from .options import debug_option, json_option


@click.group()
def data() -> None:
    """Make data sets."""


@data.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@debug_option
def digits(folder: Path, as_json: bool) -> None:
    """Write the bundled handwritten digits to DIR, as DIR/train and DIR/val.

    1,797 images of ten classes from scikit-learn, a fifth of them for validation. DIR must be new or empty.

    \b
    Example:
      shufflenet data digits digits
    """
    from shufflenet_mlflow.data.digits import write_digits
    from shufflenet_mlflow.data.folder import list_images

    write_digits(folder)
    counts = {part: len(list_images(folder / part)) for part in ("train", "val")}
    if as_json:
        from .console import print_json

        print_json({"directory": str(folder), **counts})
        return
    click.echo(f"{folder}: {counts['train']} images in train, {counts['val']} in val")
    click.echo(f"train on them: shufflenet train --train-dir {folder}/train --val-dir {folder}/val")
