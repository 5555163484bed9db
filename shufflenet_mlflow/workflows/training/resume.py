"""The checkpoint that a training run continues, or whose weights it begins with."""

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
from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT, TrainConfig, check_types, option
from shufflenet_mlflow.errors import CheckpointError, ConfigError, ResumeError, TrackingError, UnresolvedError
from shufflenet_mlflow.models.loaded import ModelDescription, describe, identify
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.resolve import latest_of_run, resolve, run_of

logger = logging.getLogger(__name__)

FORK_MAY_NOT_CHANGE = ("model", "choices", "scales", "init_from", "pretrained", "num_classes", "seed", "batch_size")
"""A checkpoint cannot be continued, not even as a run of its own, with one of these changed."""

RESUME_MAY_CHANGE = (
    "train_dir",
    "val_dir",
    "mean_image",
    "workers",
    "device",
    "display_interval",
    "val_interval",
    "save_interval",
    "on_bad_image",
    "keep_last",
    "keep_best",
    "keep_every",
    "on_save_error",
)
"""These may change when a run is resumed; data and mean image are compared by their content."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that training continues from."""

    path: Path
    payload: Mapping[str, Any]
    in_cache: bool
    """It was fetched from a run; otherwise it lies where it was found on the disk."""
    run_id: str | None = None
    """The run that it belongs to; None if MLflow has not created it yet."""

    @classmethod
    def of(cls, resolved: Resolved) -> "ResumePoint":
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
        return cls(resolved.path, payload, resolved.run_id is not None, run_id)

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
        return name is not None and name.tag == FINAL_TAG and self.iters >= total_iters


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
        return named is None or dict(named) == dict(class_to_idx)


def find_initial_weights(
    ref: str | None, options: Mapping[str, Any], store: Connection, cache_dir: Path | None
) -> InitialWeights | None:
    """Return the checkpoint that `--init-from` names; None without one.

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
    resolved = _resolve(resume, found, store, cache_dir, fork=fork)
    point = ResumePoint.of(resolved)
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


def _resolve(resume: str, found: Resolved | None, store: Connection, cache_dir: Path | None, *, fork: bool) -> Resolved:
    """Resolve `--resume`. The latest checkpoint of a run is taken from this disk if it is there, or a newer one is.

    Args:
        found: the newest valid checkpoint in `--save-dir`.
    """
    reference = parse_reference(resume)
    if fork or not isinstance(reference, RunReference) or not reference.is_latest:
        return resolve(resume, tracking_uri=store, cache_dir=cache_dir)
    local = found if found is not None else _newest_in(Path(DEFAULT_SAVE_ROOT) / reference.run_id)
    if local is not None and run_of(local.checkpoint) != reference.run_id:
        local = None
    try:
        if local is None or not _is_up_to_date(local, latest_of_run(reference.run_id, store)):
            return resolve(resume, tracking_uri=store, cache_dir=cache_dir)
    except (TrackingError, UnresolvedError) as error:
        if local is None:
            raise
        logger.warning("%s; using %s", error, local.path)
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


def _newest_in(directory: Path) -> Resolved | None:
    """Return the newest valid checkpoint in `directory`; None if there is none."""
    try:
        return newest_valid(directory)
    except UnresolvedError:
        return None


def drift(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs, name -> (before, now). A field that is new in `now` counts only if it is set."""
    return {
        name: (before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value and (name in before or value)
    }


def check_resumable(before: Mapping[str, Any], now: TrainConfig, *, new_run: bool) -> None:
    """Raise ResumeError for changed options that would make the resumed run a different one.

    Args:
        before: the configuration of the run, or of its checkpoint.
        new_run: the continuation is a run of its own, in which all but `FORK_MAY_NOT_CHANGE` may change.

    Raises:
        ResumeError: the message names the option, both values and the way out.
    """
    changed = {name: pair for name, pair in drift(before, now.to_dict()).items() if name not in RESUME_MAY_CHANGE}
    breaking = {name: pair for name, pair in changed.items() if name in FORK_MAY_NOT_CHANGE}
    refused = breaking or ({} if new_run else changed)
    if refused:
        listed = ", ".join(f"{option(name)} ({was} -> {is_})" for name, (was, is_) in refused.items())
        way_out = (
            "leave them out, or start a new run with --resume none and another --save-dir"
            if breaking
            else "leave them as they were, or pass --new-run to continue as a run of its own"
        )
        raise ResumeError(
            f"the run cannot be continued with changed {listed}; {way_out}", code="resume-options-changed"
        )
