"""The one way of text to stdout and stderr; `predictions.Output` is the other, and cleans its own."""

import click

from shufflenet_mlflow.runtime.text import visible


def say(*lines: str, err: bool = False) -> None:
    """Print lines, or an empty one; names in them, of files, classes or runs, control no terminal and begin no line."""
    for line in lines or ("",):
        click.echo(visible(line), err=err)
