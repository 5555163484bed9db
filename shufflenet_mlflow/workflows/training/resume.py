"""The checkpoint that a training run continues, or whose weights it begins with."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import Resolved, newest_valid
from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import FINAL_TAG, local_name, newest_first, parse_name
from shufflenet_mlflow.checkpoints.references import RunReference, parse_reference, run_folder
from shufflenet_mlflow.checkpoints.schema import RESUME_KEYS, check_payload, is_own
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, check_types
from shufflenet_mlflow.data.folder import same_classes
from shufflenet_mlflow.errors import CheckpointError, ConfigError, ResumeError, TrackingError, UnresolvedError
from shufflenet_mlflow.models.loaded import ModelDescription, describe, identify
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.resolve import latest_of_run, resolve, run_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that training continues from."""

    path: Path
    payload: Mapping[str, Any]
    in_cache: bool
    """It was fetched from a run; otherwise it lies where it was found on the disk."""
    run_id: str | None = None
    """The run that it belongs to; None if MLflow has not created it yet."""
    is_newest_valid: bool = False
    """MLflow was asked for the newest checkpoint of the run, and whatever is newer than this one does not verify."""
    writer: str | None = None
    """Token of the process that had the run at that time; None if MLflow was not asked."""

    @classmethod
    def of(cls, resolved: Resolved, *, is_newest_valid: bool = False) -> "ResumePoint":
        """Read a checkpoint to continue from.

        Raises:
            CheckpointError: it holds weights only, or its configuration is not understood.
        """
        payload = resolved.checkpoint.read()
        source = repr(str(resolved.path))
        check_payload(payload, RESUME_KEYS, source)
        try:
            check_types(payload["config"])
        except ConfigError as error:
            raise CheckpointError(
                f"{source}: its configuration is not understood: {error}", code="checkpoint-config-invalid"
            ) from error
        run_id = run_of(resolved.checkpoint) or resolved.run_id
        return cls(resolved.path, payload, resolved.run_id is not None, run_id, is_newest_valid, resolved.writer)

    def without_tensors(self) -> "ResumePoint":
        """Return the same without the tensors, once they are loaded: gigabytes for a large network."""
        heavy = ("state_dict", "ema_state_dict", "optimizer_state_dict")
        return replace(self, payload={key: value for key, value in self.payload.items() if key not in heavy})

    @property
    def iters(self) -> int:
        """Completed iterations."""
        return int(self.payload["iters"])

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the run at that time."""
        return dict(self.payload["config"])

    def is_final(self, total_iters: int) -> bool:
        """Whether nothing is left to train."""
        name = parse_name(self.path.name)
        was_ended = self.config.get("patience", 0) > 0 or bool(self.payload.get("stop_reason"))
        is_long_enough = self.iters >= total_iters or was_ended
        return name is not None and name.tag == FINAL_TAG and is_long_enough


@dataclass(frozen=True)
class InitialWeights:
    """The checkpoint whose weights training begins with."""

    path: Path
    payload: Mapping[str, Any]
    spec: ModelSpec
    description: ModelDescription
    run_id: str | None
    """The run that it belongs to."""

    def fits_classes(self, class_to_idx: Mapping[str, int]) -> bool:
        """Whether its classifier, as far as the file says, is for these classes."""
        named = self.description.class_to_idx
        return named is None or same_classes(named, class_to_idx)


@dataclass(frozen=True)
class TeacherPoint:
    """The checkpoint that training distils from."""

    path: Path
    payload: Mapping[str, Any]
    run_id: str | None
    """The run that it belongs to."""


def find_teacher(ref: str | None, store: Connection, cache_dir: Path | None) -> TeacherPoint | None:
    """Return the checkpoint that `--teacher` names; None without one.

    Raises:
        UnresolvedError, CheckpointError, TrackingError: the reference could not be resolved.
    """
    if ref is None:
        return None
    try:
        resolved = resolve(ref, tracking_uri=store, cache_dir=cache_dir)
        payload = resolved.checkpoint.read()
    except (UnresolvedError, CheckpointError, TrackingError) as error:
        raise type(error)(f"--teacher: {error}", code=error.code) from error
    run_id = payload.get("run_id") if is_own(payload) else None
    return TeacherPoint(resolved.path, payload, run_id or resolved.run_id)


def find_initial_weights(
    ref: str | None, options: Mapping[str, Any], store: Connection, cache_dir: Path | None
) -> InitialWeights | None:
    """Return the checkpoint that `--init-from` or `--qat` names; None without one.

    Raises:
        ConfigError: its network is not known, or is another one than the options name.
        UnresolvedError, CheckpointError, TrackingError: the reference could not be resolved.
    """
    if ref is None:
        return None
    if options.get("pretrained"):
        raise ConfigError(
            "--init-from and --pretrained exclude each other; give one of them", code="init-from-and-pretrained"
        )
    resolved = resolve(ref, tracking_uri=store, cache_dir=cache_dir)
    payload = resolved.checkpoint.read()
    source = repr(str(resolved.path))
    description = describe(payload, source)
    spec = identify(description.spec, ModelSpec.from_options(options), payload, source)
    is_qat = options.get("qat") is not None
    if spec.fake_quantized and not is_qat:
        raise ConfigError(
            f"--init-from: {source} was trained with --qat; --qat {ref} trains it further, or name the checkpoint that "
            "it began with",
            code="init-from-qat",
        )
    spec = replace(spec, fake_quantized=is_qat)
    run_id = payload.get("run_id") if is_own(payload) else None
    return InitialWeights(resolved.path, payload, spec, description, run_id or resolved.run_id)


def find_resume_point(
    resume: str, save_dir: Path | None, store: Connection, cache_dir: Path | None, *, fork: bool
) -> ResumePoint | None:
    """Return the checkpoint to continue from; None for a fresh start.

    Args:
        resume: `auto`, `none` or a checkpoint reference.
        fork: the continuation is a run of its own.

    Raises:
        ResumeError: the folder holds another run's checkpoints, or the checkpoint holds weights only.
        UnresolvedError, CheckpointError, TrackingError: the reference could not be resolved.
    """
    found = newest_valid(save_dir) if save_dir is not None else None
    if resume == "none":
        if found is not None:
            raise ResumeError(
                f"--save-dir {str(save_dir)!r} holds checkpoints already; --resume auto continues them, "
                "another --save-dir starts a new run",
                code="save-dir-not-empty",
            )
        return None
    if resume == "auto":
        if found is None:
            return None
        if fork:
            raise ResumeError(
                f"--save-dir {str(save_dir)!r} holds the run's own checkpoints; for a fork pass "
                f"--resume {save_dir} and another --save-dir",
                code="fork-into-own-folder",
            )
        return ResumePoint.of(found)
    resolved, is_newest_valid = _resolve(resume, found, store, cache_dir, fork=fork)
    point = ResumePoint.of(resolved, is_newest_valid=is_newest_valid)
    if found is not None:
        owner = run_of(found.checkpoint)
        same_folder = found.path.parent.resolve() == point.path.parent.resolve()
        if fork or (owner != point.run_id and not same_folder):
            raise ResumeError(
                f"--save-dir {str(save_dir)!r} holds checkpoints of {f'run {owner}' if owner else 'another run'}; name "
                "another folder",
                code="save-dir-holds-other-run",
            )
    return point


def _resolve(
    resume: str, found: Resolved | None, store: Connection, cache_dir: Path | None, *, fork: bool
) -> tuple[Resolved, bool]:
    """Resolve `--resume`. The latest checkpoint of a run is taken from this disk if it is there, or a newer one is.

    An older one on this disk is taken if MLflow cannot be asked for the latest, or if nothing newer there verifies; not
    if the newer one just could not be fetched, since that would rewind the run.

    Args:
        found: the newest valid checkpoint in `--save-dir`.

    Returns:
        The checkpoint, and whether it is known to be the newest valid one of the run.
    """
    reference = parse_reference(resume)
    if fork or not isinstance(reference, RunReference) or not reference.is_latest:
        return resolve(resume, tracking_uri=store, cache_dir=cache_dir), False
    local = found if found is not None else _newest_in(run_folder(Path(DEFAULT_SAVE_ROOT), reference.run_id))
    if local is not None and run_of(local.checkpoint) != reference.run_id:
        local = None
    if local is None:
        return resolve(resume, tracking_uri=store, cache_dir=cache_dir), True
    try:
        latest = latest_of_run(reference.run_id, store)
    except (TrackingError, UnresolvedError) as error:
        logger.warning("%s; using %s", error, local.path)
        return local, False
    if _is_up_to_date(local, latest):
        return local, True
    try:
        resolved = resolve(resume, tracking_uri=store, cache_dir=cache_dir)
    except UnresolvedError as error:
        if error.code != "none-verifies-in-run":
            raise
        logger.warning("%s; using %s", error, local.path)
        return local, True
    return (local if local.iters > resolved.iters else resolved), True  # it is older if the run's did not verify


def _is_up_to_date(local: Resolved, latest: CheckpointManifest | None) -> bool:
    """Whether a checkpoint on this disk is the one that the run names as its latest, or a newer one."""
    if latest is None:
        return True
    name, latest_name = local_name(local.path.name), local_name(latest.file_name)
    if name == latest_name:
        manifest = read_manifest(local.path)
        return manifest is not None and manifest.sha256 == latest.sha256
    return newest_first([name, latest_name])[0] == name


def _newest_in(directory: Path) -> Resolved | None:
    """Return the newest valid checkpoint in `directory`; None if there is none."""
    try:
        return newest_valid(directory)
    except UnresolvedError:
        return None
