"""Finding what an earlier attempt at the same job has begun: by its folder, by its name, or by the run it was given."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, check_types
from shufflenet_mlflow.errors import ConfigError, NoCheckpointError, ResumeError, TrackingError
from shufflenet_mlflow.runtime.launchers import attempt, launch_name, may_restart
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import impatient
from shufflenet_mlflow.tracking.journal import JOURNAL_NAME, read_pending
from shufflenet_mlflow.tracking.run import KnownRun, config_to_begin_with, find_job, look_up, peek_mlflow_run_id
from shufflenet_mlflow.tracking.uris import is_server
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import ResumePoint

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient


def find_attempt(client: "MlflowClient", request: TrainRequest, reporter: Reporter) -> tuple[TrainRequest, list[str]]:
    """The request, so that it continues what an earlier attempt has begun.

    Returns:
        The request, and the runs that were begun and have no checkpoint yet.

    Raises:
        ConfigError: nothing is there to be forked.
        TrackingError: nothing lies in the job's folder, and the store that could know the job does not answer.
    """
    is_named, has_folder = request.job is not None, request.save_dir is not None
    request = _named(request, reporter)
    again = attempt() > 0
    if _holds_checkpoints(request.save_dir) and again:  # the same command again: the fork, say, has been made already
        request = replace(request, resume="auto", new_run=False)
    known: KnownRun | None = None
    try:
        known = _look_up(client, request, by_name=again or (is_named and request.resume == "auto"))
    except TrackingError as error:
        if is_named and not _was_used(request.save_dir):
            raise TrackingError(
                f"{error}; --resume none begins the job anew without looking for an earlier run of it",
                error.mlflow_code,
                code="job-not-found-out",
            ) from error
        reporter.warn(f"{error}; going on with what lies here")
    if request.new_run and request.resume == "auto" and not again:
        if known is not None and known.has_checkpoint:  # the folder of that name is the parent's
            return replace(request, resume=known.run_id, save_dir=request.save_dir if has_folder else None), []
        if not _holds_checkpoints(request.save_dir):
            raise ConfigError(
                "--new-run: nothing is there to be forked; name a checkpoint with --resume", code="nothing-to-fork"
            )
        return request, []
    if known is None:
        return request, []
    if not known.has_checkpoint:
        return request, [known.run_id]
    if (
        not has_folder
        and request.save_dir is not None
        and read_pending(request.save_dir).run_id not in (None, known.run_id)
    ):
        request = replace(request, save_dir=None)  # it belongs to the run that this one was forked from
    return replace(request, resume=known.run_id, new_run=False), []


def _named(request: TrainRequest, reporter: Reporter) -> TrainRequest:
    """With the name that its launch has, if the user gave none, and with the folder of that name."""
    goes_on_by_itself = request.resume not in ("auto", "none") and not request.new_run
    if request.job is None and request.save_dir is None and not goes_on_by_itself:
        asked = json.dumps([dict(request.options), request.resume, request.new_run, request.run_name], default=str)
        request = replace(request, job=launch_name(asked, requeue=request.requeue))
        if request.job is None and may_restart():  # several machines: any of them may lead the next time
            reporter.warn("torchrun would begin anew where it starts this job again; --job NAME makes it go on instead")
    if request.job is not None and request.save_dir is None:
        request = replace(request, save_dir=Path(DEFAULT_SAVE_ROOT) / request.job)
    return request


def _holds_checkpoints(directory: Path | None) -> bool:
    return directory is not None and bool(list_checkpoints(directory))


def _was_used(directory: Path | None) -> bool:
    """Whether an earlier attempt has worked there."""
    return _holds_checkpoints(directory) or (directory is not None and os.path.exists(directory / JOURNAL_NAME))


def _look_up(client: "MlflowClient", request: TrainRequest, *, by_name: bool) -> KnownRun | None:
    """The run of an earlier attempt, as MLflow knows it; None if there is none.

    Raises:
        TrackingError: the store does not answer.
    """
    adopted = peek_mlflow_run_id() if request.resume == "auto" and not request.new_run else None
    by_name = by_name and request.job is not None
    if not by_name and adopted is None:
        return None
    with impatient() if is_server(client.tracking_uri) else nullcontext():
        known = find_job(client, str(request.job), request.experiment) if by_name else None
        if known is None and adopted is not None:  # its container, say, was started again
            known = look_up(client, adopted)
            return known if known.has_checkpoint else None  # without one it begins as any adopted run
    return known


def begin_again(
    client: "MlflowClient", request: TrainRequest, error: NoCheckpointError
) -> tuple[TrainRequest, list[str]]:
    """The request, so that it begins the run once more that `--resume` names and that has no checkpoint yet.

    Args:
        error: says so.

    Returns:
        As `find_attempt` does.

    Raises:
        NoCheckpointError: it is not known how the run began, or another one was to continue it.
        ResumeError: the folder belongs to another run.
        TrackingError: the store does not answer.
    """
    config = None if request.new_run else config_to_begin_with(client, error.run_id)
    if config is None:
        raise error
    try:
        check_types(config)
    except ConfigError as problem:
        raise NoCheckpointError(
            f"{error}; its configuration is not understood: {problem}", code="run-config-invalid"
        ) from problem
    if request.save_dir is not None and list_checkpoints(request.save_dir):
        raise ResumeError(
            f"--save-dir {str(request.save_dir)!r} holds checkpoints of another run; name another folder",
            code="save-dir-of-other-run",
        )
    return replace(request, resume="auto", inherited=config), [error.run_id]


def may_begin_again(request: TrainRequest, start: ResumePoint | None) -> bool:
    """Whether a run that has no checkpoint yet may be this one: it was begun by the same command."""
    if start is None:
        return request.resume == "auto" and not request.new_run
    return request.new_run and attempt() > 0
