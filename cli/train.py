"""`shufflenet train`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.config import (
    AMP_DTYPES,
    AUGMENT_NAMES,
    BALANCES,
    ON_SAVE_ERROR,
    OPTIMIZERS,
    RECIPE_NAMES,
    SCHEDULES,
)
from shufflenet_mlflow.errors import BadImageError, CheckpointError
from shufflenet_mlflow.models.search_space import CHANNEL_SUPERNET
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested, exit_status

from .commands import TrainingCommand
from .completing import NETWORK, REFERENCE, RUN, Folder, ImageSet, Reference
from .option import NEXT_STEP
from .options import (
    architecture_options,
    bad_image_option,
    cache_dir_option,
    common_options,
    config_option,
    device_option,
    division_options,
    flag,
    json_option,
    keep_options,
    mean_image_option,
    option,
    options,
    tracking_uri_option,
)
from .recent import remember
from .say import say
from .streams import OutputError
from .trained import result_lines, resume_command, steps_after

if TYPE_CHECKING:
    pass

REQUEST_OPTIONS = (
    "search",
    "resume",
    "new_run",
    "changed_data",
    "take_over",
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


USUAL = (
    *("model", "init_from", "input_size", "train_dir", "val_dir", "recipe", "batch_size", "epochs", "lr", "seed"),
    *("device", "workers", "amp", "save_dir", "keep_last", "resume", "job", "tracking_uri", "experiment", "run_name"),
)
"""The options that `--help` shows; `--help-all` shows all."""


@click.command(cls=TrainingCommand, usual=USUAL)
@options(
    option(
        "--model",
        metavar="NAME",
        type=NETWORK,
        help="Network; `shufflenet models` lists them.  [default: shufflenet_v2_x0_5]",
    ),
    architecture_options,
    flag("--channel-search", help="With --model shufflenet_oneshot_supernet: search the widths of units, too."),
    option(
        "--search",
        metavar="RUN",
        type=RUN,
        help="Train what a search has found: its run, its folder, those of one of its networks, or an "
        "architecture.json.  [default: none]",
    ),
    option("--num-classes", type=int, metavar="N", help="Width of the classifier.  [default: the number of classes]"),
    option(
        "--input-size",
        type=int,
        metavar="PIXELS",
        help="Input size, a multiple of 32.  [default: 224, or that of --init-from; digits: 64]",
    ),
    option(
        "--init-from",
        metavar="REF",
        type=REFERENCE,
        help="Checkpoint with the initial weights.  [default: random weights]",
    ),
    option(
        "--qat",
        metavar="REF",
        type=REFERENCE,
        help="Checkpoint to fine-tune with the rounding of int8, for `shufflenet export --int8`.  [default: none]",
    ),
    flag("--pretrained", help="Start from torchvision's published weights; torchvision/ networks only."),
    section="Network",
)
@options(
    option(
        "--train-dir",
        metavar="DIR",
        type=ImageSet(),
        help="Training images: one folder per class, or a table (.csv, .parquet).  [default: digits]",
    ),
    option(
        "--val-dir",
        metavar="DIR",
        type=ImageSet(),
        help="Validation images of the same classes.  [default: part of --train-dir]",
    ),
    division_options,
    option(
        "--augment",
        type=click.Choice(AUGMENT_NAMES),
        help="release: random crop, colours, flip; lighting: with colour noise, too; trivial, rand: crop, flip and "
        "torchvision's TrivialAugmentWide or RandAugment; shift: random crop only.  [default: the recipe's; digits: "
        "shift]",
    ),
    option("--erasing", type=float, metavar="P", help="Probability of erasing a rectangle of an image.  [default: 0]"),
    option(
        "--mixup",
        type=float,
        metavar="ALPHA",
        help="Blend each image with another, by shares from Beta(ALPHA, ALPHA).  [default: 0, not at all]",
    ),
    option(
        "--cutmix",
        type=float,
        metavar="ALPHA",
        help="Replace a rectangle of each image by another image's; with --mixup, one of the two by chance.  "
        "[default: 0, not at all]",
    ),
    option(
        "--balance",
        type=click.Choice(BALANCES),
        help="For classes of different sizes: weights in the loss, or a sampler that draws all classes equally often.  "
        "[default: none]",
    ),
    mean_image_option,
    bad_image_option,
    section="Data",
)
@options(
    option(
        "--recipe",
        type=click.Choice(RECIPE_NAMES),
        help="Set of defaults for the options below, and for --augment to --balance; `shufflenet recipes` shows them.  "
        "[default: paper; with --qat: qat]",
    ),
    option("--batch-size", type=int, metavar="N", help="Images per iteration.  [default: 64]"),
    option(
        "--epochs", type=int, metavar="N", help="Passes over the training images.  [default: the recipe's; digits: 20]"
    ),
    option(
        "--total-iters",
        type=int,
        metavar="N",
        help="Length in iterations, instead of --epochs.  [default: as --epochs says]",
    ),
    option("--optimizer", type=click.Choice(OPTIMIZERS), help="Optimizer.  [default: the recipe's, sgd]"),
    option(
        "--lr",
        type=float,
        metavar="X",
        help="Highest learning rate.  [default: the recipe's, scaled to the batch size]",
    ),
    option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help="How the learning rate falls to 0, or stays.  [default: the recipe's, linear]",
    ),
    option(
        "--warmup-epochs",
        type=float,
        metavar="X",
        help="Epochs in which the learning rate rises first.  [default: the recipe's, 0]",
    ),
    option(
        "--momentum", type=float, metavar="X", help="Momentum of SGD, beta1 of AdamW.  [default: the recipe's, 0.9]"
    ),
    option(
        "--weight-decay",
        type=float,
        metavar="X",
        help="Weight decay, except for biases and BN.  [default: the recipe's, 4e-5]",
    ),
    option(
        "--clip-norm", type=float, metavar="X", help="Largest norm of the gradients; 0: any.  [default: the recipe's]"
    ),
    option(
        "--freeze",
        metavar="PART",
        help="Keep weights and BN statistics of the backbone (all but the classifier), of the first N stages and the "
        "stem before them, or of none.  [default: none]",
    ),
    option(
        "--head-lr-factor",
        type=float,
        metavar="X",
        help="Factor of the classifier's learning rate.  [default: the recipe's, 1]",
    ),
    option(
        "--layer-decay",
        type=float,
        metavar="X",
        help="Factor of the learning rate from each stage to the one before it.  [default: the recipe's, 1]",
    ),
    option(
        "--teacher",
        metavar="REF",
        type=REFERENCE,
        help="Checkpoint of the same classes whose answers are learnt, too.  [default: none]",
    ),
    option("--label-smooth", type=float, metavar="X", help="Label smoothing.  [default: the recipe's, 0.1]"),
    option(
        "--ema-decay",
        type=float,
        metavar="DECAY",
        help="Decay of a moving average of the weights, which is then evaluated; 0: none.  [default: the recipe's]",
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
    option(
        "--patience",
        type=int,
        metavar="N",
        help="End after N validations that were no better than the best; 0: train to the end.  [default: 0]",
    ),
    option(
        "--bn-images",
        type=int,
        metavar="N",
        help="Training images, at most, for the statistics of batch normalisation in the end.  [default: 1280000]",
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
        "--threads",
        type=int,
        metavar="N",
        help="Threads that compute on the CPU.  [default: as many cores as the network keeps busy]",
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
    flag("--changed-data", help="Resume although the images have changed since; the run is tagged with it."),
    flag("--take-over", help="Resume although another process is training this run; that one stops."),
    option(
        "--job",
        metavar="NAME",
        help="Name by which --resume auto finds the run in MLflow, from any machine.  [default: none]",
    ),
    option(
        "--repeat",
        type=int,
        metavar="N",
        help="Train N times, with --seed and the seeds after it, as children of one run.  [default: once]",
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

    Without options it trains on the bundled handwritten digits. Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 saves a checkpoint
    and stops. --resume RUN_ID continues from there, and so does the same command if it names --save-dir or --job;
    without them it starts a new run.

    \b
    Examples:
      shufflenet train
      shufflenet train --train-dir photos --epochs 30
      shufflenet train --train-dir pets/train --val-dir pets/val --epochs 30
      shufflenet train --recipe finetune --init-from ShuffleNetV2.1.0x.pth.tar
      shufflenet train --config pets.toml --seed 1
      shufflenet train --repeat 5 --job baseline
      shufflenet train --resume 0123456789ab
    """
    if values.pop("channel_search"):
        values["model"] = CHANNEL_SUPERNET
    if values["repeat"] is not None:
        from .repeats import train_repeatedly

        train_repeatedly(values, as_json=as_json)
        return
    del values["repeat"]
    request_options = {name: values.pop(name) for name in REQUEST_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}

    from .stopping import say_how_to_go_on, stop_flag

    with stop_flag("stopping once the checkpoint is saved; again to stop at once") as stop:
        try:
            with stop.at_once():
                from shufflenet_mlflow.workflows.train import run_training
                from shufflenet_mlflow.workflows.training.request import TrainRequest

                from .console import ConsoleReporter, as_typed, next_steps
                from .tables import print_json

                reporter = ConsoleReporter()
                stop.last_words = partial(say_how_to_go_on, stop, as_typed("shufflenet train --resume {}"))
        except StopRequested:
            from shufflenet_mlflow.runtime.launchers import Requeue
            from shufflenet_mlflow.runtime.progress import LoggingReporter

            Requeue(bool(request_options["requeue"]), LoggingReporter()).ask_if_warned(stop)
            raise
        request_options["resume"] = request_options["resume"] or "auto"
        for name in ("new_run", "changed_data", "take_over", "requeue", "no_log_models", "no_system_metrics"):
            request_options[name] = bool(request_options[name])
        request = TrainRequest(options=given, **request_options)
        with _saying_how_to_go_on(stop):
            summary = run_training(request, reporter=reporter, stop=stop)
        if summary.is_leader and summary.run_id is not None:
            remember(request.tracking_uri, runs={summary.run_id: summary.run_name})
        if not summary.is_leader:
            pass
        elif as_json:
            print_json(summary.to_dict())
            if summary.result.stopped_by is not None:
                next_steps(resume_command(summary))
        else:
            with suppress(OutputError):  # the training is complete and saved, even if nobody can read this
                say(*result_lines(summary))
            next_steps(*steps_after(summary))
    if stop.signum is not None and summary.is_leader and "TORCHELASTIC_RUN_ID" in os.environ:
        say("A traceback of torchrun's own (SignalException) may follow; this run ended as it should.", err=True)
    if stop.signum is not None:  # perhaps during the last uploads, after training
        sys.exit(exit_status(stop.signum))


@contextmanager
def _saying_how_to_go_on(stop: StopFlag) -> Iterator[None]:
    """Have the command printed that goes on from the last checkpoint, after an error that may be gone by then."""
    try:
        yield
    except (CheckpointError, BadImageError) as error:
        if stop.resume_ref is not None:
            elsewhere = " --save-dir OTHER" if error.code == "checkpoint-unwritable" else ""
            command = f"shufflenet train --resume {quote(stop.resume_ref)}{elsewhere}"
            click.get_current_context().meta[NEXT_STEP] = f"{command}    goes on with the run"
        raise
