"""Log an evaluation to MLflow: in the run that the checkpoint belongs to, or in a run of its own."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.names import short_name
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.evaluation.report import Report
from shufflenet_mlflow.export.logged import find_logged_model
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.evaluation_metrics import EvaluatedModel, log_input_model, log_results
from shufflenet_mlflow.tracking.messages import Params, Tags, TextArtifact
from shufflenet_mlflow.tracking.names import (
    EVALUATED_CHECKPOINT_TAG,
    EVALUATED_RUN_TAG,
    EVALUATION_CONTEXT,
    EVALUATION_FOLDER,
    EVALUATION_SECTION,
    EVALUATION_TAG,
    FIGURES_FOLDER,
    NETWORK_TAG,
    OWN_EVALUATION_SECTION,
    PREDICTIONS_FILE,
    SUMMARY_FILE,
)
from shufflenet_mlflow.tracking.note import Note, indented
from shufflenet_mlflow.tracking.provenance import command_line
from shufflenet_mlflow.tracking.run import WrapperRun, make_run, new_run
from shufflenet_mlflow.tracking.target import Message, RunTarget
from shufflenet_mlflow.workflows.training.description import dataset_input

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import LoggedModel, MlflowClient, Run

LONGEST_NAME = 100
"""Characters in the name of a set of images."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: checkpoint, images and results."""

    network: str
    checkpoint: str
    """File name."""
    iters: int
    run_id: str | None
    """The run that the checkpoint belongs to."""
    name: str
    """Name of the set of images."""
    listing: ImageListing
    metrics: Mapping[str, float]
    """Values by plain name, such as `top1`."""
    report: Report

    @property
    def data(self) -> str:
        """Name of the images as MLflow accepts it: some letters only, of limited length."""
        name = re.sub(r"[^\w .:-]", "_", self.name)
        return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{self.listing.content_digest[:8]}"

    @property
    def root(self) -> str:
        """Folder of the images."""
        return str(self.listing.root.absolute())

    def with_unique_name(self, run: "Run") -> "Evaluated":
        """Return the same under another name, if the run has been evaluated on other images of that name."""
        tagged_digest = run.data.tags.get(EVALUATION_TAG + self.data)
        inputs = run.inputs.dataset_inputs if run.inputs is not None else []
        digests = {
            entry.dataset.digest
            for entry in inputs
            if entry.dataset.name == self.data and any(tag.value == EVALUATION_CONTEXT for tag in entry.tags)
        }
        if not ({tagged_digest} if tagged_digest is not None else digests) - {self.listing.content_digest}:
            return self
        return replace(self, name=f"{self.data[: LONGEST_NAME - 9]}-{self.listing.content_digest[:8]}")

    @property
    def folder(self) -> str:
        """Folder of its artifacts below `evaluation` and `figures`."""
        return f"{self.data}/{re.sub(r'[^A-Za-z0-9_.-]', '_', short_name(self.checkpoint))}"

    def summary(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        return {
            "data": self.data,
            "digest": self.listing.content_digest,
            "root": self.root,
            "images": len(self.report.outcomes.paths),
            "network": self.network,
            "checkpoint": self.checkpoint,
            "iters": self.iters,
            "run_id": self.run_id,
            "metrics": dict(self.metrics),
        }


def record_in_source(client: "MlflowClient", source: "Run", evaluated: Evaluated) -> str:
    """Log to the run that the checkpoint belongs to, under `eval/<data>/`; return its ID.

    Raises:
        TrackingError: MLflow did not answer.
    """
    evaluated = evaluated.with_unique_name(source)
    target = RunTarget(client, source.info.run_id, Path())
    Tags({EVALUATION_TAG + evaluated.data: evaluated.listing.content_digest}).send(target)
    _record(target, evaluated, EVALUATION_SECTION + evaluated.data, _logged_model(client, source, evaluated))
    return target.run_id


def record_in_new(
    client: "MlflowClient", source: "Run | None", evaluated: Evaluated, *, experiment: str | None, name: str | None
) -> str:
    """Log to a run of its own, as a child of the checkpoint's run; return its ID.

    Args:
        experiment: by default that of `source`.

    Raises:
        TrackingError: MLflow did not answer.
    """
    tags = {} if source is None else {"mlflow.parentRunId": source.info.run_id}
    create = new_run(experiment=experiment, name=name or f"eval {evaluated.network} {evaluated.data}", tags=tags)
    if source is not None and experiment is None:
        create = replace(create, experiment_id=source.info.experiment_id)
    run_id, _ = make_run(client, create)
    with WrapperRun(client, run_id, tags={}) as run:
        record_in_own(run, source, evaluated)
    return run_id


def record_in_own(run: WrapperRun, source: "Run | None", evaluated: Evaluated) -> None:
    """Log to a run that belongs to the evaluation.

    Raises:
        TrackingError: MLflow did not answer.
    """
    target = run.target
    model = _logged_model(target.client, source, evaluated) if source is not None else None
    tags = {NETWORK_TAG: evaluated.network, EVALUATED_CHECKPOINT_TAG: evaluated.checkpoint}
    if evaluated.run_id is not None:
        tags[EVALUATED_RUN_TAG] = evaluated.run_id
    run.send(Tags(tags))
    values = {
        "model": evaluated.network,
        "iters": evaluated.iters,
        "val_dir": evaluated.root,
        "val_images": len(evaluated.listing),
    }
    run.send(Params.of(values))
    top1 = f"accuracy {evaluated.metrics['top1']:.4f} on {len(evaluated.report.outcomes.paths):,} images"
    run.send(
        Note.of(
            f"**{evaluated.network}**, {evaluated.checkpoint} on **{evaluated.data}**",
            f"**Result:** {top1}",
            indented(command_line()),
        )
    )
    _record(target, evaluated, OWN_EVALUATION_SECTION, model)
    if model is not None:
        log_input_model(target, model.model_id)


def _record(target: RunTarget, evaluated: Evaluated, section: str, model: "LoggedModel | None") -> None:
    """Log the artifacts, then the metrics, which say that the artifacts are there."""
    from shufflenet_mlflow.evaluation.plots import figures_of, write_figure  # matplotlib: not before the first image

    report, listing = evaluated.report, evaluated.listing
    folder = f"{EVALUATION_FOLDER}/{evaluated.folder}"
    messages: list[Message] = [
        TextArtifact(f"{folder}/{PREDICTIONS_FILE}", report.outcomes.to_csv(report.classes)),
        TextArtifact(f"{folder}/classes.csv", report.classes_csv()),
        TextArtifact(f"{folder}/confusion.csv", report.confusion_csv()),
        TextArtifact.of_json(f"{folder}/{SUMMARY_FILE}", evaluated.summary()),
        dataset_input(listing, name=evaluated.data, context=EVALUATION_CONTEXT),
    ]
    for message in messages:
        message.send(target)
    with tempfile.TemporaryDirectory() as scratch:
        for name, draw in figures_of(report, listing.root).items():
            write_figure(draw(), Path(scratch) / name)
        with mlflow_errors(f"upload the figures of run {target.run_id}"):
            target.client.log_artifacts(target.run_id, scratch, f"{FIGURES_FOLDER}/{evaluated.folder}")
    values = {f"{section}/{name}": value for name, value in evaluated.metrics.items()}
    evaluated_model = None if model is None else EvaluatedModel(model.model_id, evaluated.data, listing.content_digest)
    log_results(target, values, evaluated.iters, evaluated_model)


def _logged_model(client: "MlflowClient", source: "Run", evaluated: Evaluated) -> "LoggedModel | None":
    """Return the logged model of the checkpoint; None if there is none."""
    manifest = RunArtifacts(client, source.info.run_id).manifest_of(evaluated.checkpoint)
    return find_logged_model(client, source, manifest) if manifest is not None else None
