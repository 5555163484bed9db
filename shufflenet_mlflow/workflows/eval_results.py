"""Log an evaluation to MLflow: in the run that the checkpoint belongs to, or in a run of its own."""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.names import short_name
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.evaluation.baseline import beside_majority
from shufflenet_mlflow.evaluation.report import Report
from shufflenet_mlflow.export.exported import ExportedFile
from shufflenet_mlflow.export.logged import find_logged_model
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.evaluation_metrics import EvaluatedModel, log_input_model, log_results
from shufflenet_mlflow.tracking.journal_file import new_provisional_id
from shufflenet_mlflow.tracking.messages import Params, Tags, TextArtifact
from shufflenet_mlflow.tracking.names import (
    DEPLOY_SECTION,
    DEPLOY_TAG,
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
from shufflenet_mlflow.tracking.run import WrapperRun, end_lost_run, make_run, new_run
from shufflenet_mlflow.tracking.target import Message, RunTarget
from shufflenet_mlflow.tracking.uris import is_server
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
    names: tuple[str, ...]
    """Names for the set of images; the first is its name, the others what it may be called if that is taken."""
    listing: ImageListing
    metrics: Mapping[str, float]
    """Values by plain name, such as `top1`."""
    report: Report
    sha256: str | None = None
    """SHA-256 of the checkpoint's file, if it has a manifest."""
    export: ExportedFile | None = None
    """The exported file in the place of a checkpoint."""

    @property
    def data(self) -> str:
        """Name of the images as MLflow accepts it: some letters only, of limited length."""
        name = re.sub(r"[^\w .:-]", "_", self.names[0])
        return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{self.listing.content_digest[:8]}"

    @property
    def root(self) -> str:
        """Folder of the images."""
        return str(self.listing.root.absolute())

    def with_unique_name(self, run: "Run") -> "Evaluated":
        """Return the same under another name, if the run has been evaluated on other images of that name."""
        candidates = [replace(self, names=self.names[place:]) for place in range(len(self.names))]
        if not self._is_free_in(run) and self._was_evaluated_in(run):  # the folder's images have changed
            candidates = candidates[:1]
        numbered = (replace(self, names=(f"{self.names[0]}-{number}",)) for number in count(2))
        return next(evaluated for evaluated in chain(candidates, numbered) if evaluated._is_free_in(run))

    def _is_free_in(self, run: "Run") -> bool:
        """Whether the run has no evaluation of other images under this name."""
        tagged_digest = run.data.tags.get(EVALUATION_TAG + self.data)
        digests = {entry.digest for entry in self._namesakes_in(run)} if tagged_digest is None else {tagged_digest}
        return digests <= {self.listing.content_digest}

    def _was_evaluated_in(self, run: "Run") -> bool:
        """Whether the run has an evaluation under this name that was of the same folder or table."""
        source = json.dumps({"uri": str(self.listing.source.absolute())})
        return any(entry.source == source for entry in self._namesakes_in(run))

    def _namesakes_in(self, run: "Run") -> list[Any]:
        inputs = run.inputs.dataset_inputs if run.inputs is not None else []
        evaluated = [entry for entry in inputs if EVALUATION_CONTEXT in [tag.value for tag in entry.tags]]
        return [entry.dataset for entry in evaluated if entry.dataset.name == self.data]

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
            **({} if self.export is None else {"export": self.export.to_dict()}),
        }


def record_in_source(client: "MlflowClient", source: "Run", evaluated: Evaluated) -> str:
    """Log to the run that the checkpoint belongs to, under `eval/<data>/`; return its ID.

    Raises:
        TrackingError: MLflow did not answer.
    """
    evaluated = evaluated.with_unique_name(source)
    target = RunTarget(client, source.info.run_id, Path())
    Tags({EVALUATION_TAG + evaluated.data: evaluated.listing.content_digest}).send(target)
    if evaluated.export is None:
        section = EVALUATION_SECTION + evaluated.data
        _record(target, evaluated, section, _logged_model(client, source, evaluated))
        return target.run_id
    kind = evaluated.export.kind
    _record(target, evaluated, f"{DEPLOY_SECTION}{kind}", None)
    on = {"data": evaluated.data, "digest": evaluated.listing.content_digest, "images": len(evaluated.listing)}
    tag = json.dumps({**evaluated.export.to_dict(), **on, "top1": evaluated.metrics["top1"]})
    Tags({f"{DEPLOY_TAG}{kind}": tag}).send(target)
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
    mark = new_provisional_id()
    try:
        run_id, _ = make_run(client, create, mark=mark)
    except TrackingError as error:
        if not error.answered and "connection refused" not in str(error):
            end_lost_run(client, create, mark)
        raise
    with WrapperRun(client, run_id, tags={}, is_new=True) as run:
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
    if evaluated.export is not None:
        tags[f"{DEPLOY_TAG}{evaluated.export.kind}"] = json.dumps(evaluated.export.to_dict())
    if evaluated.run_id is not None:
        tags[EVALUATED_RUN_TAG] = evaluated.run_id
    run.send(Tags(tags))
    values = {
        "model": evaluated.network,
        "iters": evaluated.iters,
        "val_dir": str(evaluated.listing.source.absolute()),
        "val_images": len(evaluated.listing),
    }
    run.send(Params.of(values))
    accuracy = beside_majority(evaluated.metrics["top1"], evaluated.metrics["majority"])
    top1 = f"accuracy {accuracy} on {counted(len(evaluated.report.outcomes.paths), 'image')}"
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
        figures = f"{FIGURES_FOLDER}/{evaluated.folder}"
        with mlflow_errors(f"upload the figures of run {target.run_id}"):
            target.artifacts.put_folder(scratch, figures)
        if is_server(target.client.tracking_uri):
            sizes = {path.name: path.stat().st_size for path in Path(scratch).iterdir()}
            target.artifacts.check_arrived(figures, sizes)
    metrics = {**evaluated.metrics, **(evaluated.export.fixed_metrics() if evaluated.export is not None else {})}
    values = {f"{section}/{name}": value for name, value in metrics.items()}
    evaluated_model = None if model is None else EvaluatedModel(model.model_id, evaluated.data, listing.content_digest)
    # In the run of the checkpoint all at one step: the UI draws one point of each run as bars side by side.
    step = evaluated.iters if section == OWN_EVALUATION_SECTION else 0
    log_results(target, values, step, evaluated_model)


def _logged_model(client: "MlflowClient", source: "Run", evaluated: Evaluated) -> "LoggedModel | None":
    """Return the logged model of the checkpoint; None if there is none."""
    if evaluated.export is not None:
        return None
    manifest = RunArtifacts(client, source.info.run_id).find(evaluated.checkpoint, evaluated.sha256)
    return find_logged_model(client, source, manifest) if manifest is not None else None
