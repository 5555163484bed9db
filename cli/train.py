"""`shufflenet train`."""

import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.runtime.signals import StopRequested, exit_status

from .commands import Command
from .completing import NETWORK, REFERENCE, Folder, Reference
from .errors import BadParameter
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
from .settings import weaker_of

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
"""Options that say where a run is kept; the others say what it does."""

EXCLUDING = (("epochs", "total_iters"), ("init_from", "pretrained"))
"""Pairs of which one may be given; one in the command goes before the other in a file."""


@click.command(cls=Command)
@options(
    option("--model", metavar="NAME", type=NETWORK, help="See `shufflenet models`.  [default: shufflenet_v2_x0_5]"),
    architecture_options,
    option("--num-classes", type=int, metavar="N", help="Width of the classifier.  [default: as many as folders]"),
    option("--input-size", type=int, metavar="PIXELS", help="A multiple of 32.  [default: 224; digits: 64]"),
    option(
        "--init-from",
        metavar="REF",
        type=REFERENCE,
        help="Begin with a checkpoint's weights.  [default: fresh ones]",
    ),
    flag("--pretrained", help="Begin with torchvision's published weights; torchvision/ networks."),
    section="Network",
)
@options(
    option("--train-dir", metavar="DIR", type=Folder(), help="Training images, a folder per class.  [default: digits]"),
    option("--val-dir", metavar="DIR", type=Folder(), help="Validation images, same classes.  [default: digits]"),
    option(
        "--augment",
        type=click.Choice(["release", "lighting", "shift", "none"]),
        help="release: random crop, colour, flip; lighting: and colour noise; shift: random place.  "
        "[default: the paper's; digits: shift]",
    ),
    mean_image_option,
    bad_image_option,
    section="Data",
)
@options(
    option("--batch-size", type=int, metavar="N", help="Images per iteration.  [default: 64]"),
    option("--epochs", type=int, metavar="N", help="Passes over the images.  [default: the paper's; digits: 20]"),
    option(
        "--total-iters",
        type=int,
        metavar="N",
        help="Length in iterations, instead of --epochs.  [default: of --epochs]",
    ),
    option("--lr", type=float, metavar="X", help="First learning rate.  [default: the paper's, scaled to the batch]"),
    option("--momentum", type=float, metavar="X", help="Of SGD.  [default: the paper's, 0.9]"),
    option("--weight-decay", type=float, metavar="X", help="Not on biases and BN.  [default: the paper's, 4e-5]"),
    option("--label-smooth", type=float, metavar="X", help="Label smoothing.  [default: the paper's, 0.1]"),
    option(
        "--ema-decay", type=float, metavar="DECAY", help="Evaluate a moving average of the weights.  [default: none]"
    ),
    option("--seed", type=int, metavar="N", help="Of everything random.  [default: 0]"),
    option("--display-interval", type=int, metavar="N", help="Iterations between progress lines.  [default: 20]"),
    option(
        "--val-interval", type=int, metavar="N", help="Iterations between validations.  [default: about 10 per run]"
    ),
    section="Training",
)
@options(
    device_option,
    option(
        "--workers", type=int, metavar="N", help="Decoding processes.  [default: one per core, at most 16; digits: 0]"
    ),
    option(
        "--amp",
        type=click.Choice(["off", "bf16", "fp16"]),
        help="Mixed precision in training; fp16 with a loss scaler.  [default: off]",
    ),
    flag("--compile", help="Train with torch.compile; worth a try on a GPU, slower on most CPUs."),
    option(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="Most images per forward pass.  [default: --batch-size / processes]",
    ),
    flag("--sync-bn", help="BN over the images of all processes; CUDA."),
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
        type=click.Choice(["fail", "continue"]),
        help="What a checkpoint that cannot be written means.  [default: fail]",
    ),
    section="Checkpoints",
)
@options(
    option(
        "--resume",
        metavar="auto|none|REF",
        type=Reference("auto", "none"),
        help="auto: continue what lies in --save-dir; or a file, folder, run ID, runs:/ID@ITERS.  [default: auto]",
    ),
    flag("--new-run", help="Resume as a run of its own."),
    option(
        "--job", metavar="NAME", help="Name by which auto finds the run in MLflow, on any machine.  [default: none]"
    ),
    option(
        "--grace", type=float, metavar="SECONDS", help="To bring to MLflow what is left after a signal.  [default: 20]"
    ),
    flag("--requeue", help="After SIGUSR1, Slurm's warning, ask it to start the job again."),
    section="Stop and resume",
)
@options(
    tracking_uri_option,
    option("--experiment", metavar="NAME", help="MLflow experiment.  [default: shufflenet]"),
    option("--run-name", metavar="NAME", help="Name of the run.  [default: network, data, size]"),
    flag("--no-log-models", help="Make no MLflow models of the best and the final checkpoint."),
    flag("--no-system-metrics", help="Do not log how busy the machine is."),
    cache_dir_option,
    section="MLflow",
)
@config_option
@json_option
@common_options
@click.pass_context
def train(ctx: click.Context, /, as_json: bool, **values: Any) -> None:
    """Train a network, or continue training one.

    Without options it trains on the bundled handwritten digits. Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint before
    leaving; the same command, or --resume RUN_ID, then continues where it stopped.

    \b
    Examples:
      shufflenet train
      shufflenet train --train-dir pets/train --val-dir pets/val --epochs 30
      shufflenet train --config pets.toml --init-from ShuffleNetV2.1.0x.pth.tar
      shufflenet train --config pets.toml --seed 1
      shufflenet train --resume 0123456789ab
    """
    for pair in EXCLUDING:
        if weaker := weaker_of(ctx, *pair):
            values[weaker] = None
    request_options = {name: values.pop(name) for name in REQUEST_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    _check_numbers(given)

    from .stopping import stop_flag

    with stop_flag("leaving as soon as the checkpoint is safe; once more leaves at once") as stop:
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
    if not summary.is_leader:
        pass
    elif as_json:
        print_json(summary.to_dict())
    else:
        click.echo("\n".join(_result_lines(summary)))
        next_steps(*_next_steps(summary))
    if stop.signum is not None:  # it may have come after training, while the last uploads were waited for
        sys.exit(exit_status(stop.signum))


def _check_numbers(given: dict[str, Any]) -> None:
    """What is wrong whatever the data: reported before anything heavy is imported."""
    for name in ("num_classes", "epochs", "total_iters"):
        if name in given and given[name] < 1:
            raise BadParameter(
                f"{given[name]} is not at least 1", param_hint=f"--{name.replace('_', '-')}", code="count-below-one"
            )


def _result_lines(summary: "TrainSummary") -> list[str]:
    result = summary.result
    lines = [
        f"run ID               {summary.run_id or 'none yet: MLflow was away'}",
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
        steps.append(f"shufflenet sync {folder}    brings it there")
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
    if not summary.experiment_id:  # MLflow came back while it trained
        page = ""
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    store = "" if store_file(uri) == Path.cwd() / "mlflow.db" else f" --backend-store-uri {quote(uri)}"
    mlflow = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
    return f"{mlflow} ui{store}    then http://127.0.0.1:5000{page}"
