"""The `shufflenet` command.

Commands are thin: they turn options into a request, run a workflow and print its summary. torch and MLflow are imported
when a command starts to work, so that help and wrong usage answer at once.
"""

import os
import signal
import sys

if os.path.basename(sys.argv[0]) == "shufflenet" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in `shufflenet_mlflow.__main__`

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from those that decode images

import click

import shufflenet_mlflow

from .bench import bench
from .checkpoints import checkpoints
from .commands import Main
from .compare import compare
from .completion import completion
from .data import data
from .eval import eval_
from .export import export
from .models import models
from .options import common_options
from .predict import predict
from .recipes import recipes
from .runs import runs
from .search import search
from .sync import sync
from .train import train
from .tune import tune


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(shufflenet_mlflow.__version__, prog_name="shufflenet")
@common_options
def main() -> None:
    """Train, evaluate and resume ShuffleNet image classifiers, tracked in MLflow.

    \b
    Start with:
      shufflenet train              the bundled handwritten digits, about a minute
      shufflenet train --train-dir images/train --val-dir images/val
      shufflenet eval RUN_ID        the ID that train prints, or its first characters

    Options can also be set in a file (--config pets.toml) or in the environment (SHUFFLENET_BATCH_SIZE=128). The
    command line takes precedence, then the environment, then the file.
    """


for command in (
    *(
        train,
        tune,
        search,
        eval_,
        predict,
        runs,
        compare,
        checkpoints,
        export,
        sync,
        models,
        recipes,
        data,
        bench,
        completion,
    ),
):
    main.add_command(command)
