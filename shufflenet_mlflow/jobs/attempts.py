"""Finding what an earlier attempt at the same job has begun: by its folder, by its name, or by the run it was given."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.checkpoint import list_checkpoints
from shufflenet_mlflow.client import impatient, is_server
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, check_types
from shufflenet_mlflow.errors import ConfigError, NoCheckpointError, ResumeError, TrackingError
from shufflenet_mlflow.launcher import attempt, launch_name, may_restart
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.start import Start, TrainRequest
from shufflenet_mlflow.tracking import KnownRun, config_to_begin_with, find_job, look_up, run_to_adopt

if TYPE_CHECKING:
    from shufflenet_mlflow.client import MlflowClient


def find_attempt(client: "MlflowClient", request: TrainRequest, reporter: Reporter) -> tuple[TrainRequest, list[str]]:
    """The request, so that it continues what an earlier attempt has begun.

    Returns:
        The request, and the runs that were begun and have no checkpoint yet.

    Raises:
        TrackingError: nothing lies in the job's folder, and the store that could know the job does not answer.
    """
    is_named = request.job is not None
    if not is_named and request.save_dir is None and request.resume == "auto":
        request = replace(request, job=launch_name(requeue=request.requeue))
        if request.job is None and may_restart():  # several machines: any of them may lead the next time
            reporter.warn("torchrun would begin anew where it starts this job again; --job NAME makes it go on instead")
    if request.job is not None and request.save_dir is None:
        request = replace(request, save_dir=Path(DEFAULT_SAVE_ROOT) / request.job)
    directory = request.save_dir
    found = directory is not None and directory.is_dir() and bool(list_checkpoints(directory))
    if found and attempt():  # the same command again: the fork, say, has been made already
        request = replace(request, resume="auto", new_run=False)
    if request.resume != "auto" or request.new_run:
        return request, []
    by_name = request.job is not None and (is_named or attempt() > 0)
    adopted = run_to_adopt()
    if not by_name and adopted is None:
        return request, []
    known: KnownRun | None = None
    try:
        with impatient() if is_server(client.tracking_uri) else nullcontext():
            if by_name:
                known = find_job(client, str(request.job), request.experiment)
            if known is None and adopted is not None:  # its container, say, was started again
                known = look_up(client, adopted)
    except TrackingError as error:
        if not found and by_name:
            raise TrackingError(
                f"{error}; --resume none begins the job anew without looking for an earlier run of it", error.code
            ) from error
        if found:
            reporter.warn(f"{error}; taking what lies in {str(directory)!r}")
        return request, []
    if known is None or (known.run_id == adopted and not known.has_checkpoint):
        return request, []  # an adopted run begins as any other
    if known.has_checkpoint:
        return replace(request, resume=known.run_id), []
    return request, [known.run_id]


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
        raise NoCheckpointError(f"{error}; its configuration is not understood: {problem}") from problem
    if request.save_dir is not None and list_checkpoints(request.save_dir):
        raise ResumeError(f"--save-dir {str(request.save_dir)!r} holds checkpoints of another run; name another folder")
    return replace(request, resume="auto", inherited=config), [error.run_id]


def may_begin_again(request: TrainRequest, start: Start | None) -> bool:
    """Whether a run that has no checkpoint yet may be this one: it was begun by the same command."""
    if start is None:
        return request.resume == "auto" and not request.new_run
    return request.new_run and attempt() > 0
