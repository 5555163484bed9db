"""The MLflow run that a training job writes to, also where the server is away."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.references import RunReference, parse_reference
from shufflenet_mlflow.config import TrainConfig
from shufflenet_mlflow.data.datasets import data_name
from shufflenet_mlflow.errors import ResumeError, TrackingError
from shufflenet_mlflow.runtime.launchers import attempt
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import impatient, mlflow_errors
from shufflenet_mlflow.tracking.journal import Journal, is_created, new_provisional_id
from shufflenet_mlflow.tracking.messages import Reopen
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.run import (
    CONFIG_TAG,
    JOB_TAG,
    WrapperRun,
    config_to_begin_with,
    make_run,
    new_run,
    reopen_run,
    require_not_beyond,
    tags_for_mlflow_run,
    take_mlflow_run_id,
)
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.uris import is_server
from shufflenet_mlflow.workflows.training.description import config_digest
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import InitialWeights, ResumePoint

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient


LONGEST_TAG = 5000
"""MLflow takes so many characters, whatever the store."""


@dataclass(frozen=True)
class OpenedRun:
    """The run to write to."""

    run: str
    """Its ID, or what it is called until MLflow makes it."""
    first: tuple[Message, ...] = ()
    """What it has to be told first, once the server answers."""
    is_new: bool = False
    name: str = ""
    experiment_id: str = ""
    made: WrapperRun | None = None
    """The run that `mlflow run` made if that is another one: it ends as this one does."""


@contextmanager
def ending_on_error(client: "MlflowClient", run: str) -> Iterator[None]:
    """If the block fails, the run that was just made for it has failed."""
    try:
        yield
    except BaseException:
        if is_created(run):
            with suppress(TrackingError), mlflow_errors(f"end run {run}"):
                client.set_terminated(run, "FAILED")
        raise


def open_run(
    client: "MlflowClient",
    request: TrainRequest,
    config: TrainConfig,
    start: ResumePoint | None,
    init: InitialWeights | None,
    journal: Journal | None,
    reporter: Reporter,
    *,
    begun: Sequence[str] = (),
    drifted: Mapping[str, tuple[Any, Any]] | None = None,
) -> OpenedRun:
    """The resumed run, the one that `mlflow run` made, or a new one; if the server is away, as far as it is known.

    Args:
        begun: runs that this one may be, if they are of the same configuration and have no checkpoint yet: the
            process that made them was killed.
        drifted: what has changed since `start` was written: name -> (then, now).

    Raises:
        ResumeError: the run has gone on beyond the checkpoint, or is not there any more.
        TrackingError: the store refuses.
    """
    adopted = take_mlflow_run_id()
    tags = _first_tags(config, init)
    name = request.run_name or f"{config.model} {data_name(config.train_dir)} {config.input_size}px"
    known, create = adopted, None
    if start is not None and request.new_run and start.run_id is not None:
        tags |= {"resumed.from_run": start.run_id, "resumed.from_iters": str(start.iters)}
    elif start is not None and not request.new_run and (start.run_id is not None or (journal and journal.run)):
        known = start.run_id or (journal.run if journal else None)
        tags = {"resumed.from_iters": str(start.iters)}
    elif (
        start is None
        and attempt()
        and journal is not None
        and journal.run
        and not is_created(journal.run_id_of(journal.run))
    ):
        known = journal.run  # MLflow was away then, too
    if start is not None and drifted:
        tags[f"drift.{start.iters}"] = redact(json.dumps(drifted))[:LONGEST_TAG]
    if request.job is not None:
        tags[JOB_TAG] = request.job
    plain = tags
    if known is None:
        create = new_run(experiment=request.experiment, name=name, tags=tags)
    elif known == adopted:
        tags = tags_for_mlflow_run(request.run_name, tags)
    if known is not None and not is_created(known):  # the journal is still to make it
        return OpenedRun(known, (Reopen(tags),), name=name)
    try:
        with impatient() if is_server(client.tracking_uri) else nullcontext():
            if (found := _begun_with(client, begun, config)) is not None:
                known, create, tags = found, None, plain
            if create is not None:
                run_id, is_new = make_run(client, create)
            else:
                run_id, is_new = _continue(client, str(known), tags, request, start, adopted), False
            run = client.get_run(run_id)
            made = None
            if adopted is not None and adopted != run_id:
                made = WrapperRun(client, adopted, tags={"continues.run": run_id})
        return OpenedRun(run_id, (), is_new, run.info.run_name, run.info.experiment_id, made)
    except TrackingError as error:
        if error.answered or not is_server(client.tracking_uri):
            raise
        reporter.warn(f"{error}; training goes on without, and what belongs to MLflow is kept and sent later")
    return OpenedRun(known or new_provisional_id(), (create or Reopen(tags),), name=name)


def _first_tags(config: TrainConfig, init: InitialWeights | None) -> dict[str, str]:
    """What a run is told when it is made."""
    tags = {"network": config.model, CONFIG_TAG: redact(json.dumps(config.to_dict()))}
    if len(tags[CONFIG_TAG]) > LONGEST_TAG:  # paths of thousands of characters
        del tags[CONFIG_TAG]
    if init is not None and init.run_id is not None:
        tags |= {"init_from.run": init.run_id, "init_from.checkpoint": init.path.name}
    return tags


def _begun_with(client: "MlflowClient", begun: Sequence[str], config: TrainConfig) -> str | None:
    """The first of the runs that were begun with this configuration and have no checkpoint yet; None if none was."""
    digest = config_digest(config.to_dict())
    for run_id in begun:
        before = config_to_begin_with(client, run_id)
        if before is not None and config_digest(before) == digest:
            return run_id
    return None


def _continue(
    client: "MlflowClient",
    run_id: str,
    tags: dict[str, str],
    request: TrainRequest,
    start: ResumePoint | None,
    adopted: str | None,
) -> str:
    try:
        if start is not None and not request.new_run and not _means_latest(request.resume):
            require_not_beyond(client, run_id, start.iters)
        reopen_run(client, run_id, tags)
    except TrackingError as error:
        if run_id == adopted or not error.answered:
            raise
        raise ResumeError(
            f"{error}; --new-run continues as a run of its own, --tracking-uri names another store",
            code="run-not-continued",
        ) from error
    return run_id


def _means_latest(resume: str) -> bool:
    """Whether resolving has looked for the newest checkpoint of a run, and may have passed over corrupt ones."""
    if resume == "auto":
        return False
    reference = parse_reference(resume)
    return isinstance(reference, RunReference) and reference.is_latest
