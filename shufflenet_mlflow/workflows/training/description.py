"""What a training run is about: what its MLflow run says, and what each of its checkpoints holds besides its state."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from shufflenet_mlflow.config import RESUME_MAY_CHANGE, TrainConfig, drift
from shufflenet_mlflow.data.datasets import data_name
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.tracking.messages import DatasetInput, Params, TextArtifact
from shufflenet_mlflow.tracking.note import Note, indented
from shufflenet_mlflow.tracking.provenance import command_line
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.training.loop import TrainData, TrainResult
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.resume import ResumePoint

OF_PIXELS = ("torchvision", "opencv-python-headless", "simplejpeg")
"""Packages that decode and change images."""

NEEDED_FOR_EQUALITY = ("shufflenet-mlflow", "torch", *OF_PIXELS, "device", "instructions", "threads", "processes")
"""Where one of these differs, rounding does."""

PARTS = "parts"
"""Where this differs, batch normalisation sees other images together."""


def config_digest(config: Mapping[str, Any]) -> str:
    """What two runs have in common that differ in nothing but what may change when one is resumed."""
    values = {name: value for name, value in config.items() if name not in RESUME_MAY_CHANGE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def describe(config: TrainConfig, data: TrainData) -> tuple[Message, ...]:
    """Parameters, data sets, configuration, classes."""
    epochs = config.total_iters / data.order.iters_per_epoch
    values = {**config.to_dict(), "epochs": int(epochs) if epochs.is_integer() else epochs}
    for key in ("train_dir", "val_dir"):
        values[key] = values[key] or data_name(None)
    return (
        Params.of(values),
        dataset_input(data.train, name=data_name(config.train_dir), context="training"),
        dataset_input(data.val, name=data_name(config.val_dir), context="validation"),
        TextArtifact.of_json("config.json", config.to_dict()),
        TextArtifact.of_json("classes.json", data.train.class_to_idx),
    )


def describe_in_words(planned: Plan, result: str) -> Note:
    """The run's description: network, data, command and result."""
    config, data = planned.config, planned.data
    return Note.of(
        f"**{config.model}** on **{data_name(config.train_dir)}**: {len(data.train):,} training and "
        f"{len(data.val):,} validation images of {len(data.train.classes)} classes, {config.input_size} px",
        f"**Result:** {result}",
        indented(command_line()),
    )


def result_in_words(result: TrainResult, best: Mapping[str, Any] | None, total_iters: int) -> str:
    """How far it came and how good it was, in a sentence."""
    parts = [f"iteration {result.iters:,} of {total_iters:,}"]
    if result.val_top1 is not None:
        parts.append(f"validation accuracy {result.val_top1:.4f}")
    if best is not None:
        parts.append(f"best {best['val_top1']:.4f} at iteration {best['iters']:,}")
    return ", ".join(parts) + ("; stopped by a signal" if result.stopped_by is not None else "")


def dataset_input(listing: ImageListing, *, name: str, context: str) -> DatasetInput:
    """A set of images as an input of a run."""
    return DatasetInput(
        name,
        listing.content_digest,
        str(listing.root.absolute()),
        len(listing),
        len(listing.classes),
        context,
        "content" if listing.is_small else "listing",
    )


def cost(planned: Plan) -> dict[str, float]:
    """The network's size, as metrics."""
    config = planned.config
    size = model_cost(config.model, config.num_classes, config.input_size, **planned.architecture.kwargs())
    return {"model/parameters": size.parameters, "model/macs": size.macs}


def environment(planned: Plan, device: torch.device, world: World) -> dict[str, Any]:
    """What the bits of a result depend on besides the configuration."""
    versions = {"python": platform.python_version()}
    for package in ("shufflenet-mlflow", "torch", *OF_PIXELS):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # installed in some way that leaves no metadata
            continue
    return {
        **versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        PARTS: planned.data.micro_batches.count,
    }


def constants(planned: Plan, surroundings: Mapping[str, Any]) -> dict[str, Any]:
    """What every checkpoint of the run holds besides its state."""
    config, data = planned.config, planned.data
    kwargs = {"num_classes": config.num_classes, **planned.architecture.kwargs()}
    return {
        "model": {"name": config.model, "kwargs": kwargs},
        "preprocess": data.preprocess.to_dict(),
        "class_to_idx": data.train.class_to_idx,
        "config": config.to_dict(),
        "data": {"train_digest": data.train.digest, "val_digest": data.val.digest},
        "environment": dict(surroundings),
    }


def drift_since(start: ResumePoint, config: TrainConfig, surroundings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What has changed since the checkpoint was written: name -> (then, now)."""
    then = start.payload.get("environment")
    changed = {} if then is None else drift(then, surroundings)
    return {**drift(start.config, config.to_dict()), **changed}
