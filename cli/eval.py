"""`shufflenet eval`."""

import shutil
import sys
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.config import LOG_TO, SPLITS
from shufflenet_mlflow.evaluation.baseline import beside_majority
from shufflenet_mlflow.evaluation.top5 import has_top5

from .commands import Command
from .completing import ImageSet
from .option import ERROR_PRINTED
from .options import (
    bad_image_option_with,
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
from .recent import remember
from .say import say

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.eval import EvalSummary

WORST_CLASSES = 3
NETWORK_OPTIONS = ("model", "choices", "scales", "input_size", "mean_image")
"""Options that `predict` needs again if the checkpoint does not say."""


@click.command(
    "eval", cls=Command, usual=("val_dir", "split", "device", "batch_size", "workers", "log_to", "tracking_uri")
)
@ref_argument
@option(
    "--val-dir",
    metavar="DIR",
    type=ImageSet(),
    section="Data",
    help="Images: one folder per class, or a table (.csv, .parquet).  [default: the run's]",
)
@option(
    "--split",
    type=click.Choice(SPLITS),
    section="Data",
    help="Images of a table's column split, or of the side on which the run has them.  [default: val]",
)
@bad_image_option_with("the run's, or fail")
@network_options
@options(
    device_option,
    option("--batch-size", type=int, metavar="N", help="Images per batch.  [default: the run's]"),
    option(
        "--workers",
        type=int,
        metavar="N",
        help="Processes that decode images.  [default: one per core, at most 16]",
    ),
    section="Machine",
)
@options(
    option(
        "--log-to",
        type=click.Choice(LOG_TO),
        help="Run to log to: the checkpoint's, a new one, none.  [default: source if REF is a run or model]",
    ),
    option("--experiment", metavar="NAME", help="MLflow experiment for --log-to new.  [default: the checkpoint's]"),
    option("--run-name", metavar="NAME", help="Name of the run for --log-to new.  [default: network and data]"),
    tracking_uri_option,
    cache_dir_option,
    section="MLflow",
)
@config_option
@json_option
@common_options
def eval_(ref: str, as_json: bool, **values: Any) -> None:
    """Evaluate a checkpoint on an image folder.

    REF is a file, a folder of checkpoints, a run ID or its first characters, runs:/ID, runs:/ID@best, runs:/ID@latest,
    runs:/ID@ITERS, models:/NAME@ALIAS or models:/NAME/VERSION. A run ID alone means the run's best checkpoint. An
    exported file (.onnx, .xml, .pt2) runs in its own runtime; its result goes to the run that it was made from.

    Logs accuracies, loss, accuracy by class, calibration, confusion matrix, the most confident mistakes, throughput,
    and the prediction for each image.

    \b
    Examples:
      shufflenet eval 01234567
      shufflenet eval runs:/01234567@latest --val-dir pets/test --json
      shufflenet eval weights.pth.tar --model shufflenet_v2_x1_0 --val-dir val
    """
    from shufflenet_mlflow.tracking.redaction import redact
    from shufflenet_mlflow.workflows.eval import EvalRequest, run_evaluation

    from .confusion import confusion_lines
    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    given = {name: value for name, value in values.items() if value is not None}
    with stop_flag() as stop:
        summary = run_evaluation(EvalRequest(ref, **given), reporter=ConsoleReporter(), stop=stop)
    met = [run_id for run_id in (summary.logged_to, summary.run_id) if run_id is not None]
    if met:
        remember(values["tracking_uri"], runs=dict.fromkeys(met, ""))
    if as_json:
        document = summary.to_dict()
        if summary.problem is not None:
            document["error"] = {"code": summary.problem.code, "message": redact(str(summary.problem))}
            click.get_current_context().meta[ERROR_PRINTED] = True
        print_json(document)
    else:
        say(*_result_lines(summary))
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        if table := confusion_lines(summary.report, width):
            say("", *table)
        next_steps(*_next_steps(summary))
    if summary.problem is not None:
        raise summary.problem


def _result_lines(summary: "EvalSummary") -> list[str]:
    result = summary.result
    skipped = f", {result.skipped} unreadable skipped" if result.skipped else ""
    lines = [
        f"checkpoint  {summary.checkpoint}",
        f"network     {summary.model}, iteration {summary.iters}",
    ]
    if summary.run_id:
        lines.append(f"run ID      {summary.run_id}")
    lines += [
        *([f"data        {summary.data}"] if summary.data else []),
        f"images      {result.n}{skipped}  ({summary.images_per_second:.0f} per second)",
        f"top1        {beside_majority(result.top1, result.majority)}",
        f"mean class  {result.mean_class_accuracy:.4f}",
        *([f"top5        {result.top5:.4f}"] if has_top5(len(summary.report.classes)) else []),
        f"loss        {result.loss:.4f}",
    ]
    worst = sorted(
        (row for row in summary.report.class_rows() if row.accuracy is not None), key=lambda row: row.accuracy or 0.0
    )[:WORST_CLASSES]
    lines.append("worst       " + ", ".join(f"{row.name} {row.accuracy:.4f}" for row in worst))
    if summary.logged_to:
        lines.append(f"logged to   run {summary.logged_to}")
    return lines


def _next_steps(summary: "EvalSummary") -> list[str]:
    from .tables import SHORT_ID

    if summary.logged_to is None:
        params = click.get_current_context().params
        given = {name: params[name] for name in NETWORK_OPTIONS if params.get(name) is not None}
        if not summary.run_id:
            given.setdefault("model", summary.model)
        named = "".join(f" --{name.replace('_', '-')} {quote(str(value))}" for name, value in given.items())
        return [f"shufflenet predict {quote(str(summary.checkpoint))} IMAGE{named}"]
    if summary.export is not None:
        file = quote(str(summary.checkpoint))
        return [
            f"shufflenet compare {file}    what it gets wrong and its checkpoint does not",
            f"shufflenet bench --deploy {file}    its size and latency",
        ]
    steps = [f"shufflenet compare {summary.logged_to[:SHORT_ID]} RUN    another run, evaluated on the same images"]
    if summary.run_id is not None:
        promoted = f"{summary.run_id[:SHORT_ID]}@{summary.iters}"
        steps.append(f"shufflenet checkpoints promote {promoted} --name NAME")
    return steps
