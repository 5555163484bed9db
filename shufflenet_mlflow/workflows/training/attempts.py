"""Find what an attempt at a training run continues: by its folder, its job's name, or the run it was given."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, check_types, weights_ref
from shufflenet_mlflow.errors import ConfigError, DeletedError, NoCheckpointError, ResumeError, TrackingError
from shufflenet_mlflow.runtime.launchers import attempt as attempts_before
from shufflenet_mlflow.runtime.launchers import launch_name, may_restart
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, read_pending
from shufflenet_mlflow.tracking.lifecycle import refuse_deleted_run, suppress_unanswered
from shufflenet_mlflow.tracking.run import (
    KnownRun,
    config_to_begin_with,
    find_job,
    known_run,
    peek_mlflow_run_id,
    wanted_experiment,
)
from shufflenet_mlflow.tracking.run_ids import complete
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import (
    InitialWeights,
    ResumePoint,
    TeacherPoint,
    find_initial_weights,
    find_resume_point,
    find_teacher,
)


@dataclass(frozen=True)
class Attempt:
    """Facts found out about a request: names in full, and what an earlier attempt left behind."""

    resume: str
    """`auto`, `none`, or a checkpoint reference with a whole run ID."""
    is_fork: bool
    """The continuation is a run of its own."""
    save_dir: Path | None
    """Folder of the checkpoints; None if it is named after the run, which does not exist yet."""
    job: str | None
    """Name that the user gave, or that all attempts of this launch share."""
    is_automatic: bool = False
    """A launcher, or the name of a job, has started it again: nobody is there to be asked."""
    init_from: str | None = None
    """Reference with a whole run ID."""
    teacher: str | None = None
    """Likewise."""
    qat: str | None = None
    """Likewise."""
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of a run that is started again because it has no checkpoint: the defaults of options not given."""
    unstarted_runs: tuple[str, ...] = ()
    """Runs that an earlier attempt created, and that have no checkpoint yet."""
    resume_point: ResumePoint | None = None
    initial_weights: InitialWeights | None = None
    teacher_point: TeacherPoint | None = None

    def options(self, request: TrainRequest) -> dict[str, Any]:
        """Return the options that were given, over those of the run that is continued or started again."""
        inherited = self.resume_point.config if self.resume_point is not None else dict(self.inherited)
        references = {"init_from": self.init_from, "teacher": self.teacher, "qat": self.qat}
        return {**inherited, **request.options, **{name: ref for name, ref in references.items() if ref}}

    @property
    def own_point(self) -> ResumePoint | None:
        """The resume point, if it is a checkpoint of this very run; a fork has none of its own yet."""
        return None if self.is_fork else self.resume_point

    def may_be_unstarted_run(self) -> bool:
        """Whether a run without a checkpoint may be this one: the same command created it."""
        if self.resume_point is None:
            return self.resume == "auto" and not self.is_fork
        return self.is_fork and attempts_before() > 0

    def without_tensors(self) -> "Attempt":
        """Return the same without the tensors of its checkpoints, once they are loaded."""
        point = self.resume_point.without_tensors() if self.resume_point is not None else None
        weights = replace(self.initial_weights, payload={}) if self.initial_weights is not None else None
        teacher = replace(self.teacher_point, payload={}) if self.teacher_point is not None else None
        return replace(self, resume_point=point, initial_weights=weights, teacher_point=teacher)


def find_attempt(request: TrainRequest, store: Connection, reporter: Reporter) -> Attempt:
    """Find out what a training run continues, and read that checkpoint.

    Raises:
        ConfigError: there is nothing to fork.
        ResumeError: the folder belongs to another run.
        DeletedError: the run, or the experiment, was deleted.
        TrackingError: the job's folder is empty, and the store that could know the job does not answer.
        UnresolvedError, CheckpointError: see `find_resume_point`, `find_initial_weights`.
    """
    attempt = _find_earlier(request, _as_asked(request, store, reporter), store, reporter)
    if request.experiment is not None:
        _require_experiment(store, request.experiment)
    try:
        point = find_resume_point(attempt.resume, attempt.save_dir, store, request.cache_dir, fork=attempt.is_fork)
        attempt = replace(attempt, resume_point=point)
    except NoCheckpointError as error:
        attempt = _start_again(attempt, store, error)
        reporter.note(f"run {error.run_id} has no checkpoint yet: starting it again")
    if attempt.own_point is not None:
        _require_run(store, attempt.own_point.run_id)
    elif not attempt.unstarted_runs and peek_mlflow_run_id() is None:
        _require_experiment(store, request.experiment)
    options = attempt.options(request)
    attempt = replace(attempt, teacher_point=find_teacher(options.get("teacher"), store, request.cache_dir))
    if attempt.resume_point is not None:
        return attempt
    ref = weights_ref(options)
    return replace(attempt, initial_weights=find_initial_weights(ref, options, store, request.cache_dir))


def _require_run(store: Connection, run_id: str | None) -> None:
    """Refuse to continue a deleted run before the work, if the store answers.

    Raises:
        DeletedError: the run, or its experiment, was deleted.
    """
    if run_id is None or not store.exists():
        return
    try:
        with suppress_unanswered():
            refuse_deleted_run(store.client, run_id)
    except DeletedError as error:
        raise DeletedError(
            f"{error}; --new-run with another --save-dir goes on as a run of its own", error.command, code=error.code
        ) from error


def _require_experiment(store: Connection, experiment: str | None) -> None:
    """Refuse to begin a run in a deleted experiment before the work, if the store answers.

    Raises:
        DeletedError: the experiment was deleted.
    """
    if store.exists():
        with store.impatient(), suppress_unanswered():
            wanted_experiment(store.client, experiment)


def _as_asked(request: TrainRequest, store: Connection, reporter: Reporter) -> Attempt:
    """Return the attempt that the request names, with whole run IDs, and the job's name and folder.

    Raises:
        UnresolvedError: the beginning of a run ID fits none, or several.
        TrackingError: MLflow did not answer.
    """

    def named(name: str) -> str | None:
        ref = request.options.get(name)
        return str(complete(ref, store)) if ref is not None else None

    resume, job, save_dir = request.resume, request.job, request.save_dir
    names_checkpoint = resume not in ("auto", "none")
    is_automatic = attempts_before() > 0 or (resume == "auto" and (job is not None or peek_mlflow_run_id() is not None))
    if job is None and save_dir is None and (request.new_run or not names_checkpoint):
        asked = json.dumps([dict(request.options), resume, request.new_run, request.run_name], default=str)
        job = launch_name(asked, requeue=request.requeue)
        if job is None and may_restart():  # several machines: any of them may lead the next time
            reporter.warn("if torchrun restarts this job, training starts from scratch; --job NAME makes it resume")
    if job is not None and save_dir is None:
        save_dir = Path(DEFAULT_SAVE_ROOT) / job
    return Attempt(
        resume=str(complete(resume, store)) if names_checkpoint else resume,
        is_fork=request.new_run,
        save_dir=save_dir,
        job=job,
        is_automatic=is_automatic,
        init_from=named("init_from"),
        teacher=named("teacher"),
        qat=named("qat"),
    )


def _find_earlier(request: TrainRequest, attempt: Attempt, store: Connection, reporter: Reporter) -> Attempt:
    """Return the attempt, pointed at what an earlier attempt at the same job has left in its folder or in MLflow."""
    is_restart = attempts_before() > 0
    if is_restart and _has_checkpoints(attempt.save_dir):  # the same command again: a fork has been made already
        attempt = replace(attempt, resume="auto", is_fork=False)
    known: KnownRun | None = None
    try:
        is_named = request.job is not None and attempt.resume == "auto"
        known = _find_run(request, attempt, store, by_name=is_restart or is_named)
    except DeletedError:
        raise
    except TrackingError as error:
        if request.job is not None and not _was_used(attempt.save_dir):
            raise TrackingError(
                f"{error}; --resume none starts the job without looking for an earlier run of it",
                error.mlflow_code,
                code="job-not-found-out",
            ) from error
        reporter.warn(f"{error}; continuing with what is on this disk")
    if attempt.is_fork and attempt.resume == "auto" and not is_restart:
        if known is not None and known.has_checkpoint:  # the folder of that name is the parent's
            return replace(attempt, resume=known.run_id, save_dir=request.save_dir)
        if not _has_checkpoints(attempt.save_dir):
            raise ConfigError(
                "--new-run: nothing was found to fork; name a checkpoint with --resume", code="nothing-to-fork"
            )
        return attempt
    if known is None:
        return _as_folder_says(attempt, reporter)
    if not known.has_checkpoint:
        return replace(attempt, unstarted_runs=(known.run_id,))
    owner = read_pending(attempt.save_dir).run_id if attempt.save_dir is not None else None
    if request.save_dir is None and owner not in (None, known.run_id):
        attempt = replace(attempt, save_dir=None)  # it belongs to the run that this one was forked from
    return replace(attempt, resume=known.run_id, is_fork=False)


def _as_folder_says(attempt: Attempt, reporter: Reporter) -> Attempt:
    """Return the attempt that continues the folder's run, if a process there has, and was killed before it saved."""
    if attempt.resume != "auto" or attempt.is_fork or attempt.save_dir is None or _has_checkpoints(attempt.save_dir):
        return attempt
    pending = read_pending(attempt.save_dir)
    if pending.run_id is None or pending.lease is None or not pending.lease.iters:
        return attempt
    reporter.note(f"{str(attempt.save_dir)!r} belongs to run {pending.run_id}, which is continued")
    return replace(attempt, resume=pending.run_id)


def _find_run(request: TrainRequest, attempt: Attempt, store: Connection, *, by_name: bool) -> KnownRun | None:
    """Return the run of an earlier attempt, as MLflow knows it; None if there is none.

    Raises:
        TrackingError: the store does not answer.
    """
    mlflow_run_id = peek_mlflow_run_id() if attempt.resume == "auto" and not attempt.is_fork else None
    by_name = by_name and attempt.job is not None
    if not by_name and mlflow_run_id is None:
        return None
    with store.impatient():
        known = find_job(store.client, str(attempt.job), request.experiment) if by_name else None
        if known is None and mlflow_run_id is not None:  # its container, say, was started again
            known = known_run(store.client, mlflow_run_id)
            return known if known.has_checkpoint else None  # without one it starts as any run of `mlflow run`
    return known


def _start_again(attempt: Attempt, store: Connection, error: NoCheckpointError) -> Attempt:
    """Return the attempt that starts the run again which `--resume` names and which has no checkpoint yet.

    Args:
        error: says that it has none.

    Raises:
        NoCheckpointError: it is not known how the run began, or it was to be forked.
        ResumeError: the folder belongs to another run.
        TrackingError: the store does not answer.
    """
    if not attempt.is_fork:
        _require_run(store, error.run_id)
    config = None if attempt.is_fork else config_to_begin_with(store.client, error.run_id)
    if config is None:
        raise error
    try:
        check_types(config)
    except ConfigError as invalid:
        raise NoCheckpointError(
            f"{error}; its configuration is not understood: {invalid}", code="run-config-invalid"
        ) from invalid
    if _has_checkpoints(attempt.save_dir):
        raise ResumeError(
            f"--save-dir {str(attempt.save_dir)!r} holds checkpoints of another run; name another folder",
            code="save-dir-of-other-run",
        )
    return replace(attempt, resume="auto", inherited=config, unstarted_runs=(error.run_id,))


def _has_checkpoints(directory: Path | None) -> bool:
    return directory is not None and bool(list_checkpoints(directory))


def _was_used(directory: Path | None) -> bool:
    """Whether an earlier attempt has worked in the folder."""
    return _has_checkpoints(directory) or (directory is not None and os.path.exists(directory / JOURNAL_NAME))
