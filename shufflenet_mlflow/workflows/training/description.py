"""Describe a training run: in its MLflow run, and in each of its checkpoints."""

import hashlib
import json
import platform
import shlex
from collections.abc import Mapping
from typing import Any

import torch

from shufflenet_mlflow.config import DEFAULTS, RunConfig, command_of
from shufflenet_mlflow.data.datasets import data_name
from shufflenet_mlflow.data.identity import DataIdentity
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.evaluation.baseline import beside_majority
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.models.entry_points import Registration
from shufflenet_mlflow.runtime.devices import processor
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.runtime.versions import installed_versions
from shufflenet_mlflow.tracking.images import images_file
from shufflenet_mlflow.tracking.messages import DatasetInput, Params, TextArtifact
from shufflenet_mlflow.tracking.names import (
    CLASSES_FILE,
    CONFIG_FILE,
    CONFIG_TAG,
    DRIFT_TAG,
    INIT_FROM_CHECKPOINT_TAG,
    INIT_FROM_RUN_TAG,
    JOB_TAG,
    NETWORK_TAG,
    RESUMED_FROM_ITERS_TAG,
    RESUMED_FROM_RUN_TAG,
    TEACHER_CHECKPOINT_TAG,
    TEACHER_RUN_TAG,
    VALIDATION_CONTEXT,
)
from shufflenet_mlflow.tracking.note import Note, indented
from shufflenet_mlflow.tracking.provenance import command_line
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.training.changes import RESUME_MAY_CHANGE, drift
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.training.result import TrainResult
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.resume import ResumePoint

OF_PIXELS = ("torchvision", "opencv-python-headless", "simplejpeg")
"""Packages that decode and transform images."""

PROCESSOR = "processor"
"""Key of the kind of the processor, which checkpoints of earlier versions lack."""

NETWORK_PACKAGE = "network's package"
"""Key of the package that registers the network."""

NEEDED_FOR_EQUALITY = (
    *("shufflenet-mlflow", "torch", *OF_PIXELS, NETWORK_PACKAGE),
    *("device", PROCESSOR, "instructions", "threads", "processes"),
)
"""Entries of the environment that results depend on, up to rounding."""

MICRO_BATCHES = "parts"
"""Key of the number of micro-batches: where it differs, batch normalisation sees other images together."""

MAX_TAG_LENGTH = 5000
"""Characters that MLflow accepts in a tag, whatever the store."""


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a digest of the options that may not change on resuming; defaults count as fields that are not there."""
    values = {
        name: value
        for name, value in config.items()
        if name not in RESUME_MAY_CHANGE and (name not in DEFAULTS or value != DEFAULTS[name])
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def first_tags(
    attempt: Attempt,
    config: RunConfig,
    changed: Mapping[str, tuple[Any, Any]],
    *,
    is_continued: bool,
) -> dict[str, str]:
    """Return the tags that a run begins or continues with; one that is continued has most of them already.

    Those of command, code and hardware are in `tracking.provenance`.

    Args:
        changed: what has changed since the checkpoint was written; see `drift_since`.
    """
    point, weights, teacher = attempt.resume_point, attempt.initial_weights, attempt.teacher_point
    if point is not None and is_continued:
        tags = {RESUMED_FROM_ITERS_TAG: str(point.iters)}
    else:
        tags = {NETWORK_TAG: config.model, CONFIG_TAG: redact(json.dumps(config.to_dict()))}
        if len(tags[CONFIG_TAG]) > MAX_TAG_LENGTH:  # paths of thousands of characters
            del tags[CONFIG_TAG]
        if weights is not None and weights.run_id is not None:
            tags |= {INIT_FROM_RUN_TAG: weights.run_id, INIT_FROM_CHECKPOINT_TAG: weights.path.name}
        if teacher is not None and teacher.run_id is not None:
            tags |= {TEACHER_RUN_TAG: teacher.run_id, TEACHER_CHECKPOINT_TAG: teacher.path.name}
        if point is not None and attempt.is_fork and point.run_id is not None:
            tags |= {RESUMED_FROM_RUN_TAG: point.run_id, RESUMED_FROM_ITERS_TAG: str(point.iters)}
    if point is not None and changed:
        tags[f"{DRIFT_TAG}{point.iters}"] = redact(json.dumps(changed))[:MAX_TAG_LENGTH]
    if attempt.job is not None:
        tags[JOB_TAG] = attempt.job
    return tags


def describe(config: RunConfig, data: TrainData) -> tuple[Message, ...]:
    """Return messages with parameters, data sets, configuration and classes."""
    epochs = config.total_iters / data.order.iters_per_epoch
    values = {**config.to_dict(), "epochs": int(epochs) if epochs.is_integer() else epochs}
    if config.train_dir is None:
        values |= dict.fromkeys(("train_dir", "val_dir"), data_name(None))
    return (
        Params.of(values),
        dataset_input(data.train, name=data_name(config.train_dir), context="training"),
        dataset_input(data.val, name=data_name(config.val_dir or config.train_dir), context=VALIDATION_CONTEXT),
        TextArtifact.of_json(CONFIG_FILE, config.to_dict()),
        TextArtifact.of_json(CLASSES_FILE, data.train.class_to_idx),
        *images_file({"train": data.train.image_digests, "val": data.val.image_digests}),
    )


def describe_in_words(plan: Plan, result: str) -> Note:
    """Return the run's description: network, data, result and command."""
    config, data = plan.config, plan.data
    return Note.of(
        f"**{config.model}** on **{data_name(config.train_dir)}**: {len(data.train):,} training and "
        f"{counted(len(data.val), 'validation image')} of "
        f"{counted(len(data.train.classes), 'class', 'classes')}, {config.input_size} px",
        f"**Result:** {result}",
        indented(_command(config)),
    )


def _command(config: RunConfig) -> str:
    """Return the command that trained this run; one that does the same if it was resumed, or begun by `mlflow run`."""
    typed = command_line()
    if "--resume" not in typed and " ''" not in typed:
        return typed
    chosen = {name: value for name, value in config.to_dict().items() if DEFAULTS.get(name) != value}
    return redact(shlex.join(("shufflenet", "train", *command_of(chosen))))


def result_in_words(result: TrainResult, best: Mapping[str, Any] | None, total_iters: int) -> str:
    """Return progress and accuracy in a sentence."""
    parts = [f"iteration {result.iters:,} of {total_iters:,}"]
    if result.val_top1 is not None:
        parts.append(f"validation accuracy {beside_majority(result.val_top1, result.val_majority)}")
    if best is not None:
        parts.append(f"best {best['val_top1']:.4f} at iteration {best['iters']:,}")
    end = "; stopped by a signal" if result.stopped_by is not None else ""
    if result.pause_reason:
        end = f"; stopped at {result.pause_reason}"
    if result.stop_reason:
        end = f"; ended by a callback: {result.stop_reason}"
    if result.ended_by_patience:
        end = "; ended by --patience: validation did not get better"
    return ", ".join(parts) + end


def dataset_input(listing: ImageListing, *, name: str, context: str) -> DatasetInput:
    """Return the message that logs a set of images as an input of a run."""
    return DatasetInput(
        name,
        listing.content_digest,
        str(listing.source.absolute()),
        len(listing),
        len(listing.classes),
        context,
        "content" if listing.is_small else "listing",
    )


def model_cost_metrics(plan: Plan) -> dict[str, float]:
    """Return the network's size as metrics; without a section, the UI draws them below the curves."""
    config = plan.config
    size = model_cost(config.model, config.num_classes, config.input_size, **plan.spec.kwargs())
    return {"parameters": size.parameters, "macs": size.macs}


def environment(plan: Plan, device: torch.device, world: World) -> dict[str, Any]:
    """Return versions and hardware that the bits of a result depend on."""
    return {
        "python": platform.python_version(),
        **installed_versions(("shufflenet-mlflow", "torch", *OF_PIXELS)),
        **({NETWORK_PACKAGE: plan.spec.network.package} if isinstance(plan.spec.network, Registration) else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        PROCESSOR: processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": plan.config.threads or torch.get_num_threads(),
        "processes": world.size,
        MICRO_BATCHES: plan.data.micro_batches.count,
    }


def constants(
    plan: Plan, surroundings: Mapping[str, Any], *, teacher_digest: str | None = None, is_leader: bool = True
) -> dict[str, Any]:
    """Return the entries of every checkpoint besides the training state.

    Args:
        teacher_digest: hash of the weights that training distils from, if any.
        is_leader: only the leader, which writes the checkpoints, reads the images' content.
    """
    config, data = plan.config, plan.data
    return {
        "model": plan.spec.to_entry(config.num_classes),
        "preprocess": data.preprocess.to_dict(),
        "class_to_idx": data.train.class_to_idx,
        "config": config.to_dict(),
        "data": {
            **DataIdentity.of(data.train, with_content=is_leader).to_payload("train"),
            **DataIdentity.of(data.val, with_content=is_leader).to_payload("val"),
        },
        "environment": dict(surroundings),
        **({"teacher": teacher_digest} if teacher_digest is not None else {}),
    }


def drift_since(point: ResumePoint, plan: Plan, surroundings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what has changed since the checkpoint was written: name -> (then, now)."""
    then = point.payload.get("environment")
    known = {name: value for name, value in surroundings.items() if name != PROCESSOR or name in (then or {})}
    changed = {} if then is None else drift(then, known)
    return {**drift({**DEFAULTS, **point.config}, plan.config.to_dict()), **changed, **plan.data_changes}
