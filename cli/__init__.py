"""The `shufflenet` command.

Commands are thin: they turn options into a request, run a job of the library and print its summary. torch and MLflow
are imported when a command begins to work, so that help and wrong usage answer at once.
"""

import os
import sys
import traceback
from typing import Any

import click

import shufflenet_mlflow
from shufflenet_mlflow.errors import ElsewhereError, ShuffleNetError
from shufflenet_mlflow.stopping import EXIT_BASE, StopRequested

from .bench import bench
from .checkpoints import checkpoints
from .compare import compare
from .data import data
from .eval import eval_
from .export import export
from .models import models
from .options import DEBUG, debug_option
from .predict import predict
from .runs import runs
from .sync import sync
from .train import train

SIGINT = 2


LONGEST_LINE = 2000
"""Characters of an error: a file can hold names of any length."""


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"


class _Commands(click.Group):
    """Ends foreseen errors with one line and the exit status that is documented for them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ElsewhereError as error:  # the first process of the job says what it was
            sys.exit(error.exit_status)
        except ShuffleNetError as error:
            from shufflenet_mlflow.client import redact

            if ctx.meta.get(DEBUG):
                click.echo(redact(traceback.format_exc()), err=True, nl=False)
                sys.exit(error.exit_status)
            click.echo(f"Error: {_one_line(redact(str(error)))}", err=True)
            sys.exit(error.exit_status)
        except StopRequested as stop:
            if os.environ.get("RANK", "0") == "0":
                click.echo(f"Stopped by {stop}.", err=True)
            sys.exit(stop.exit_status)
        except KeyboardInterrupt:
            click.echo("Stopped by SIGINT.", err=True)
            sys.exit(EXIT_BASE + SIGINT)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(shufflenet_mlflow.__version__, prog_name="shufflenet")
@debug_option
def main() -> None:
    """Train, evaluate and resume ShuffleNet image classifiers, tracked in MLflow.

    \b
    Begin with:
      shufflenet train                     the bundled handwritten digits, about a minute
      shufflenet train --train-dir images/train --val-dir images/val
      shufflenet eval RUN_ID
    """


for command in (train, eval_, predict, runs, compare, checkpoints, export, sync, models, data, bench):
    main.add_command(command)
