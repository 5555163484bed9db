"""What a training run begins with: a checkpoint to continue, or one whose weights it takes over."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import Resolved, newest_valid
from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest, read_manifest
from shufflenet_mlflow.checkpoints.names import FINAL_TAG, newest_first, parse_name
from shufflenet_mlflow.checkpoints.references import RunReference, parse_reference
from shufflenet_mlflow.checkpoints.schema import RESUME_KEYS, check_payload, is_own
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, check_types
from shufflenet_mlflow.errors import CheckpointError, ConfigError, ResumeError, TrackingError, UnresolvedError
from shufflenet_mlflow.models.loaded import ModelDescription, describe, identify
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.tracking.resolve import latest_of_run, resolve, run_of, run_of_file
from shufflenet_mlflow.workflows.training.request import TrainRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that training continues from."""

    path: Path
    payload: Mapping[str, Any]
    in_cache: bool
    """It was fetched from a run; otherwise it lies where it was found on the disk."""
    run_id: str | None = None
    """The run that it belongs to; None if MLflow has not made it yet."""

    def without_tensors(self) -> "ResumePoint":
        """The same without what is loaded by now: for a large network these are gigabytes."""
        heavy = ("state_dict", "ema_state_dict", "optimizer_state_dict")
        return replace(self, payload={key: value for key, value in self.payload.items() if key not in heavy})

    @property
    def iters(self) -> int:
        return int(self.payload["iters"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.payload["config"])

    def is_final(self, total_iters: int) -> bool:
        """Whether nothing is left to do."""
        name = parse_name(self.path.name)
        return name is not None and name.tag == FINAL_TAG and self.iters >= total_iters


@dataclass(frozen=True)
class InitialWeights:
    """The checkpoint whose weights training begins with."""

    path: Path
    payload: Mapping[str, Any]
    architecture: ModelSpec
    described: ModelDescription
    run_id: str | None
    """The run that it belongs to."""

    def fits_classes(self, class_to_idx: Mapping[str, int]) -> bool:
        """Whether its classifier, as far as it says, tells these classes apart."""
        named = self.described.class_to_idx
        return named is None or dict(named) == dict(class_to_idx)


def find_initial_weights(request: TrainRequest) -> InitialWeights | None:
    """The checkpoint that `--init-from` names; None without one.

    Raises:
        ConfigError: its network is not known, or is another one than the options name.
        UnresolvedError, CheckpointError, TrackingError: the reference could not be resolved.
    """
    options = {**request.inherited, **request.options}
    ref = options.get("init_from")
    if ref is None:
        return None
    if options.get("pretrained"):
        raise ConfigError(
            "--init-from and --pretrained exclude each other; give one of them", code="init-from-and-pretrained"
        )
    resolved = resolve(ref, tracking_uri=request.tracking_uri, cache_dir=request.cache_dir)
    payload = read_checkpoint(resolved.path)
    source = repr(str(resolved.path))
    described = describe(payload, source)
    architecture = identify(described.architecture, ModelSpec.asked(options), payload, source)
    run_id = payload.get("run_id") if is_own(payload) else None
    return InitialWeights(resolved.path, payload, architecture, described, run_id or resolved.run_id)


def find_resume_point(request: TrainRequest) -> ResumePoint | None:
    """The checkpoint to continue from; None for a fresh start.

    Raises:
        ResumeError: the folder holds another run's checkpoints, or the checkpoint holds weights only.
        UnresolvedError, CheckpointError, TrackingError: the reference could not be resolved.
    """
    directory = request.save_dir
    found = newest_valid(directory) if directory is not None else None
    if request.resume == "none":
        if found is not None:
            raise ResumeError(
                f"--save-dir {str(directory)!r} holds checkpoints already; --resume auto continues them, "
                "another --save-dir begins anew",
                code="save-dir-not-empty",
            )
        return None
    if request.resume == "auto":
        if found is None:
            return None
        if request.new_run:
            raise ResumeError(
                f"--save-dir {str(directory)!r} holds the run's own checkpoints; for a fork pass "
                f"--resume {directory} and another --save-dir",
                code="fork-into-own-folder",
            )
        return _load_start(found.path, None)
    resolved = _resolve(request)
    start = _load_start(resolved.path, resolved.run_id)
    if found is not None:
        there = run_of_file(found.path)
        same_folder = found.path.parent.resolve() == start.path.parent.resolve()
        if request.new_run or (there != start.run_id and not same_folder):
            whose = f"run {there}" if there else "another run"
            raise ResumeError(
                f"--save-dir {str(directory)!r} holds checkpoints of {whose}; name another folder",
                code="save-dir-holds-other-run",
            )
    return start


def _resolve(request: TrainRequest) -> Resolved:
    """What `--resume` means. The latest of a run may lie on this disk: newer than MLflow has it, or just as well."""
    reference = parse_reference(request.resume)
    if request.new_run or not isinstance(reference, RunReference) or not reference.is_latest:
        return resolve(request.resume, tracking_uri=request.tracking_uri, cache_dir=request.cache_dir)
    local = _newest_of_run(request.save_dir or Path(DEFAULT_SAVE_ROOT) / reference.run_id, reference.run_id)
    try:
        if local is None or not _is_up_to_date(local, latest_of_run(reference.run_id, request.tracking_uri)):
            return resolve(request.resume, tracking_uri=request.tracking_uri, cache_dir=request.cache_dir)
    except (TrackingError, UnresolvedError) as error:
        if local is None:
            raise
        logger.warning("%s; taking %s", error, local.path)
    return local


def _is_up_to_date(local: Resolved, latest: CheckpointManifest | None) -> bool:
    """Whether a checkpoint on this disk is the one that the run names as its latest, or a newer one."""
    if latest is None:
        return True
    name = local.path.name
    if name == latest.file_name:
        manifest = read_manifest(local.path)
        return manifest is not None and manifest.sha256 == latest.sha256
    return newest_first([name, latest.file_name])[0] == name


def _newest_of_run(directory: Path, run_id: str) -> Resolved | None:
    """The newest checkpoint in `directory` that verifies, if it is one of that run's."""
    try:
        found = newest_valid(directory)
    except UnresolvedError:
        return None
    return found if found is not None and run_of_file(found.path) == run_id else None


def _load_start(path: Path, fetched_from: str | None) -> ResumePoint:
    payload = read_checkpoint(path)
    source = repr(str(path))
    check_payload(payload, RESUME_KEYS, source)
    try:
        check_types(payload["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{source}: its configuration is not understood: {error}", code="checkpoint-config-invalid"
        ) from error
    return ResumePoint(path, payload, fetched_from is not None, run_of(path, payload) or fetched_from)
