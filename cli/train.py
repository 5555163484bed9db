"""`shufflenet train`."""

import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.config import AMP_DTYPES, AUGMENT_NAMES, ON_SAVE_ERROR
from shufflenet_mlflow.runtime.signals import StopRequested, exit_status

from .commands import TrainingCommand
from .completing import NETWORK, REFERENCE, Folder, Reference
from .options import (
    architecture_options,
    bad_image_option,
    cache_dir_option,
    common_options,
    config_option,
    device_option,
    flag,
    json_option,
    keep_options,
    mean_image_option,
    option,
    options,
    tracking_uri_option,
)
from .recent import remember

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.training.run import TrainSummary

REQUEST_OPTIONS = (
    "resume",
    "new_run",
    "save_dir",
    "tracking_uri",
    "experiment",
    "run_name",
    "cache_dir",
    "job",
    "grace",
    "requeue",
    "no_log_models",
    "no_system_metrics",
)
"""Options that say where a run is kept and how it is continued; the others say what it does."""


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
    option(
        "--init-from",
        metavar="REF",
        type=REFERENCE,
        help="Checkpoint with the initial weights.  [default: random weights]",
    ),
    flag("--pretrained", help="Start from torchvision's published weights; torchvision/ networks only."),
    section="Network",
)
@options(
    option(
        "--train-dir", metavar="DIR", type=Folder(), help="Training images, one folder per class.  [default: digits]"
    ),
    option("--val-dir", metavar="DIR", type=Folder(), help="Validation images of the same classes.  [default: digits]"),
    option(
        "--augment",
        type=click.Choice(AUGMENT_NAMES),
        help="release: random crop, colours, flip; lighting: with colour noise, too; shift: random crop only.  "
        "[default: the paper's; digits: shift]",
    ),
    mean_image_option,
    bad_image_option,
    section="Data",
)
@options(
    option("--batch-size", type=int, metavar="N", help="Images per iteration.  [default: 64]"),
    option(
        "--epochs", type=int, metavar="N", help="Passes over the training images.  [default: the paper's; digits: 20]"
    ),
    option(
        "--total-iters",
        type=int,
        metavar="N",
        help="Length in iterations, instead of --epochs.  [default: as --epochs says]",
    ),
    option(
        "--lr", type=float, metavar="X", help="Initial learning rate.  [default: the paper's, scaled to the batch size]"
    ),
    option("--momentum", type=float, metavar="X", help="Momentum of SGD.  [default: the paper's, 0.9]"),
    option(
        "--weight-decay",
        type=float,
        metavar="X",
        help="Weight decay, except for biases and BN.  [default: the paper's, 4e-5]",
    ),
    option("--label-smooth", type=float, metavar="X", help="Label smoothing.  [default: the paper's, 0.1]"),
    option(
        "--ema-decay",
        type=float,
        metavar="DECAY",
        help="Decay of a moving average of the weights, which is then evaluated.  [default: none]",
    ),
    option(
        "--seed",
        type=int,
        metavar="N",
        help="Random seed: initial weights, data order, augmentation, dropout.  [default: 0]",
    ),
    option("--display-interval", type=int, metavar="N", help="Iterations between progress lines.  [default: 20]"),
    option(
        "--val-interval", type=int, metavar="N", help="Iterations between validations.  [default: about 10 per run]"
    ),
    section="Training",
)
@options(
    device_option,
    option(
        "--workers",
        type=int,
        metavar="N",
        help="Processes that decode images.  [default: one per core, at most 16; digits: 0]",
    ),
    option(
        "--amp",
        type=click.Choice(list(AMP_DTYPES)),
        help="Mixed precision in training; fp16 scales the loss.  [default: off]",
    ),
    flag("--compile", help="Train with torch.compile: often faster on a GPU, slower on most CPUs."),
    option(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="Most images per forward pass.  [default: --batch-size / processes]",
    ),
    flag("--sync-bn", help="Batch normalisation over the images of all processes; needs CUDA."),
    section="Machine",
)
@options(
    option(
        "--save-dir",
        type=Folder(path_type=Path),
        metavar="DIR",
        help="Folder for checkpoints.  [default: models/RUN_ID]",
    ),
    option(
        "--save-interval", type=int, metavar="N", help="Iterations between checkpoints.  [default: about 10 per run]"
    ),
    keep_options,
    option(
        "--on-save-error",
        type=click.Choice(ON_SAVE_ERROR),
        help="Stop at a checkpoint that cannot be written, or continue.  [default: fail]",
    ),
    section="Checkpoints",
)
@options(
    option(
        "--resume",
        metavar="auto|none|REF",
        type=Reference("auto", "none"),
        help="auto: continue what is in --save-dir; or a file, folder, run ID, runs:/ID@ITERS.  [default: auto]",
    ),
    flag("--new-run", help="Continue as a new run."),
    option(
        "--job",
        metavar="NAME",
        help="Name by which --resume auto finds the run in MLflow, from any machine.  [default: none]",
    ),
    option("--grace", type=float, metavar="SECONDS", help="Time to finish uploads after a signal.  [default: 20]"),
    flag("--requeue", help="Have Slurm start the job again after its warning, SIGUSR1."),
    section="Stop and resume",
)
@options(
    tracking_uri_option,
    option("--experiment", metavar="NAME", help="MLflow experiment.  [default: shufflenet]"),
    option("--run-name", metavar="NAME", help="Name of the run.  [default: network, data, size]"),
    flag("--no-log-models", help="Do not log the best and the final checkpoint as MLflow models."),
    flag("--no-system-metrics", help="Do not log CPU, memory and GPU usage."),
    cache_dir_option,
    section="MLflow",
)
@config_option
@json_option
@common_options
def train(as_json: bool, **values: Any) -> None:
    """Train a network, or continue training one.

    Without options it trains on the bundled handwritten digits. Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint and
    stops; the same command, or --resume RUN_ID, then continues from there.

    \b
    Examples:
      shufflenet train
      shufflenet train --train-dir pets/train --val-dir pets/val --epochs 30
      shufflenet train --config pets.toml --init-from ShuffleNetV2.1.0x.pth.tar
      shufflenet train --config pets.toml --seed 1
      shufflenet train --resume 0123456789ab
    """
    request_options = {name: values.pop(name) for name in REQUEST_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}

    from .stopping import stop_flag

    with stop_flag("stopping once the checkpoint is saved; again to stop at once") as stop:
        try:
            with stop.at_once():
                from shufflenet_mlflow.workflows.train import run_training
                from shufflenet_mlflow.workflows.training.request import TrainRequest

                from .console import ConsoleReporter, next_steps
                from .tables import print_json

                reporter = ConsoleReporter()
        except StopRequested:
            from shufflenet_mlflow.runtime.launchers import Requeue
            from shufflenet_mlflow.runtime.progress import LoggingReporter

            Requeue(bool(request_options["requeue"]), LoggingReporter()).ask_if_warned(stop)
            raise
        request_options["resume"] = request_options["resume"] or "auto"
        for name in ("new_run", "requeue", "no_log_models", "no_system_metrics"):
            request_options[name] = bool(request_options[name])
        request = TrainRequest(options=given, **request_options)
        summary = run_training(request, reporter=reporter, stop=stop)
    if summary.is_leader and summary.run_id is not None:
        remember(request.tracking_uri, runs={summary.run_id: summary.run_name})
    if not summary.is_leader:
        pass
    elif as_json:
        print_json(summary.to_dict())
    else:
        click.echo("\n".join(_result_lines(summary)))
        next_steps(*_next_steps(summary))
    if stop.signum is not None:  # perhaps during the last uploads, after training
        sys.exit(exit_status(stop.signum))


def _result_lines(summary: "TrainSummary") -> list[str]:
    result = summary.result
    lines = [
        f"run ID               {summary.run_id or 'none yet: MLflow did not answer'}",
        f"run name             {summary.run_name}",
        f"iterations           {result.iters}  (epoch {result.epoch})",
        f"checkpoint           {result.checkpoint or 'none yet'}",
    ]
    if result.val_top1 is not None:
        lines.append(f"validation accuracy  {result.val_top1:.4f}")
    if summary.pending:
        lines.append(f"not in MLflow yet    {summary.pending} entries, kept in {summary.save_dir}")
    return lines


def _next_steps(summary: "TrainSummary") -> list[str]:
    result, steps = summary.result, []
    folder = quote(str(summary.save_dir))
    ref = folder if summary.pending or summary.run_id is None else summary.run_id
    if summary.pending:
        steps.append(f"shufflenet sync {folder}    sends it")
    if result.stopped_by is not None and result.checkpoint is not None:
        steps.append(f"shufflenet train --resume {ref}")
    elif result.checkpoint is not None:
        steps.append(f"shufflenet eval {ref}")
    if summary.run_id is not None:
        steps.append(_ui_hint(summary))
    return steps


def _ui_hint(summary: "TrainSummary") -> str:
    page = f"/#/experiments/{summary.experiment_id}/runs/{summary.run_id}?workflowType=machine_learning"
    from shufflenet_mlflow.tracking.redaction import redact
    from shufflenet_mlflow.tracking.uris import store_file

    uri = redact(summary.tracking_uri)
    if not summary.experiment_id:  # the run was made while it trained
        page = ""
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    store = "" if store_file(uri) == Path.cwd() / "mlflow.db" else f" --backend-store-uri {quote(uri)}"
    mlflow = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
    return f"{mlflow} ui{store}    then http://127.0.0.1:5000{page}"
