"""`shufflenet data check`: a folder of images in, what spoils a training or its figures out."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.references import RunReference, parse_reference
from shufflenet_mlflow.data.checking.folders import Part, list_parts
from shufflenet_mlflow.data.checking.images import Look, look_at_all
from shufflenet_mlflow.data.checking.page import write_page
from shufflenet_mlflow.data.checking.report import CheckReport, Reference, report_on
from shufflenet_mlflow.data.digests import shortened
from shufflenet_mlflow.data.table import is_table
from shufflenet_mlflow.errors import UnresolvedError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.images import training_digests
from shufflenet_mlflow.tracking.names import CONFIG_TAG
from shufflenet_mlflow.tracking.run_ids import complete, read_run


@dataclass(frozen=True)
class CheckRequest:
    """A data set to check."""

    directory: Path
    against: str | None = None
    """A folder, a table, or a run."""
    out: Path | None = None
    """Page to write."""
    tracking_uri: str | None = None


def run_check(request: CheckRequest, *, reporter: Reporter, stop: StopFlag) -> CheckReport:
    """Look at every image of a data set, and of what it is compared with.

    Raises:
        DataError: a folder holds no images, or cannot be read.
        UnresolvedError: the run is not known, or does not say what it was trained on.
        ExportError: the page cannot be written.
        TrackingError: MLflow did not answer.
        StopRequested: a signal arrived.
    """
    parts = list_parts(request.directory, option="DIR")
    reference, others = _reference(request) if request.against is not None else (None, [])
    looks = _look(parts, "looking at images", reporter, stop)
    if reference is not None:
        seen = _look(others, f"looking at {reference.name}", reporter, stop)
        if reference.digests:  # only those that the run was trained on: its folder may hold others
            seen = [look for look in seen if look.digest is not None and shortened(look.digest) in reference.digests]
        reference = replace(reference, looks=tuple(seen))
    report = report_on(request.directory, parts, looks, reference)
    if request.out is not None:
        write_page(report, request.out)
    return report


def _look(parts: Sequence[Part], name: str, reporter: Reporter, stop: StopFlag) -> list[Look]:
    files = [file for part in parts for file in part.files]
    if not files:
        return []
    with reporter.phase(name, len(files)) as phase:
        return list(look_at_all(files, phase, stop))


def _reference(request: CheckRequest) -> tuple[Reference, list[Part]]:
    """Return what `--against` names, and the folders to look at for it."""
    against = str(request.against)
    if os.path.isdir(against) or is_table(against):
        return Reference(against), list_parts(Path(against), option="--against", prefix=f"{against}/")
    prepare_environment()
    store = Connection(request.tracking_uri)
    named = parse_reference(complete(against, store))
    if not isinstance(named, RunReference) or not named.is_bare:
        raise UnresolvedError(
            f"--against {against!r} is neither a folder, a table nor a run ID; `shufflenet runs` lists runs",
            code="check-against-unknown",
        )
    run = read_run(store, named.run_id)
    digests = training_digests(RunArtifacts(store.client, named.run_id))
    directory = _training_folder(run.data.tags)
    if not digests and directory is None:
        raise UnresolvedError(
            f"run {named.run_id} does not say which images it was trained on, and its folder of training images is not "
            "on this machine; --against takes a folder, too",
            code="run-images-unknown",
        )
    parts = list_parts(directory, option="--against", prefix=f"{directory}/") if directory is not None else []
    return Reference(f"run {named.run_id}", (), digests), parts


def _training_folder(tags: Any) -> Path | None:
    """Return the folder or table that a run was trained on, if it is on this machine."""
    try:
        config = json.loads(tags.get(CONFIG_TAG, ""))
        directory = config["train_dir"]
    except (ValueError, KeyError, TypeError):
        return None
    return Path(directory) if isinstance(directory, str) and os.path.exists(directory) else None
