"""Lines that `shufflenet train` prints of a run that has ended."""

import os
import shutil
import sys
from shlex import quote
from typing import TYPE_CHECKING

from shufflenet_mlflow.evaluation.baseline import beside_majority
from shufflenet_mlflow.runtime.text import counted

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.training.run import TrainSummary


def result_lines(summary: "TrainSummary") -> list[str]:
    """Return the result, and where it is."""
    result = summary.result
    patience = "; ended by --patience: validation did not get better" if result.ended_by_patience else ""
    lines = [
        f"run ID               {summary.run_id or 'none yet: MLflow did not answer'}",
        f"run name             {summary.run_name}",
        f"iterations           {result.iters}  (epoch {result.epoch}{patience})",
        f"checkpoint           {result.checkpoint or 'none yet'}",
    ]
    if result.val_top1 is not None:
        lines.append(f"validation accuracy  {beside_majority(result.val_top1, result.val_majority)}")
    if "val/mean_class_accuracy" in result.validation:
        lines.append(f"mean class accuracy  {result.validation['val/mean_class_accuracy']:.4f}")
    if result.best is not None:
        lines.append(f"best checkpoint      {_best_in_words(summary)}")
    if summary.pending:
        lines.append(f"not in MLflow yet    {counted(summary.pending, 'entry', 'entries')}, kept in {summary.save_dir}")
    return lines


def _best_in_words(summary: "TrainSummary") -> str:
    """Return where the best checkpoint is, and what a run ID alone means if it is not the last one."""
    best = summary.result.best or {}
    text = f"iteration {best['iters']}, accuracy {best['val_top1']:.4f}"
    if summary.run_id is None or best["iters"] == summary.result.iters:
        return text
    return f"{text}; the run ID alone means it, {summary.run_id[:12]}@latest the last one"


def steps_after(summary: "TrainSummary") -> list[str]:
    """Return the commands that come next."""
    result, steps = summary.result, []
    if summary.pending:
        steps += [f"{summary.restoring}    restores the run"] if summary.restoring else []
        steps.append(f"shufflenet sync {quote(str(summary.save_dir))}    sends it")
    if result.stopped_by is None and result.checkpoint is not None:
        steps.append(f"shufflenet eval {_ref(summary)}")
    if summary.run_id is not None:
        steps.append(_ui_hint(summary))
    if result.stopped_by is not None:
        steps.append(resume_command(summary))  # last, where it is seen
    return steps


def resume_command(summary: "TrainSummary") -> str:
    """Return the command that goes on with the run."""
    return f"shufflenet train --resume {_ref(summary)}"


def _ref(summary: "TrainSummary") -> str:
    """Return the run's ID, or its folder if MLflow does not have everything yet."""
    return quote(str(summary.save_dir)) if summary.pending or summary.run_id is None else summary.run_id


def _ui_hint(summary: "TrainSummary") -> str:
    page = f"/#/experiments/{summary.experiment_id}/runs/{summary.run_id}?workflowType=machine_learning"
    from shufflenet_mlflow.tracking.paths import as_typed_for_mlflow, store_file
    from shufflenet_mlflow.tracking.redaction import redact

    uri = redact(summary.tracking_uri)
    if not summary.experiment_id:  # the run was made while it trained
        page = ""
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    is_default = os.path.abspath(store_file(uri) or "") == os.path.abspath("mlflow.db")
    store = "" if is_default else f" --backend-store-uri {quote(as_typed_for_mlflow(uri))}"
    mlflow = "mlflow" if shutil.which("mlflow") else f"{sys.executable} -m mlflow"
    return f"{mlflow} ui{store}    then http://127.0.0.1:5000{page}"
