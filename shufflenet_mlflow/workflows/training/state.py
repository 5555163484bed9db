"""The training state before the first iteration: fresh, resumed, or with another checkpoint's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from shufflenet_mlflow.checkpoints.loading import load_checkpoint, weights_of
from shufflenet_mlflow.config import TrainConfig, option
from shufflenet_mlflow.errors import ConfigError, DataError
from shufflenet_mlflow.models.loaded import classes_in, suggest_fitting_models
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, keep_freed_memory, move_model
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.training.loop import TrainData
from shufflenet_mlflow.training.recipe import make_ema, make_optimizer, make_scheduler
from shufflenet_mlflow.training.state import TrainingState
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.description import (
    MICRO_BATCHES,
    NEEDED_FOR_EQUALITY,
    drift_since,
    environment,
)
from shufflenet_mlflow.workflows.training.resume import InitialWeights

OF_ONE_MACHINE = ("train_dir", "val_dir", "mean_image", "init_from", "workers", "device")
"""Options in which the processes of one job may differ."""


@dataclass(frozen=True)
class PreparedState:
    """A training state, and what its results depend on besides the configuration."""

    state: TrainingState
    environment: Mapping[str, Any]
    drift: Mapping[str, tuple[Any, Any]]
    """Changes since the checkpoint was written: name -> (then, now)."""


def prepare_state(plan: Plan, attempt: Attempt, context: JobContext) -> PreparedState:
    """Build the training state, and load what the attempt continues.

    Raises:
        ConfigError: the device cannot do what the options ask for.
        CheckpointError: the weights do not fit the network.
    """
    config, reporter = plan.config, context.reporter
    device = usable_device(config, context.world)
    keep_freed_memory(device)
    surroundings = environment(plan, device, context.world)
    point, weights = attempt.resume_point, attempt.initial_weights
    drift: dict[str, tuple[Any, Any]] = {}
    state = fresh_state(plan, device, context.world, fetch_pretrained=point is None)
    if point is not None:
        state.load_state_dict(point.payload, config)
        drift = drift_since(point, config, surroundings)
        _warn_of_drift(drift, reporter)
    if weights is not None:
        _load_initial_weights(state, weights, plan.data, reporter)
    return PreparedState(state, surroundings, drift)


def usable_device(config: TrainConfig, world: World) -> torch.device:
    """Return this process's device.

    Raises:
        ConfigError: there is no such device, or it cannot do what the options ask for.
    """
    device = choose_device(world.device(config.device))
    if config.sync_bn and device.type != "cuda":
        raise ConfigError(
            f"--sync-bn needs CUDA, and the device is {device.type}; leave it out", code="sync-bn-needs-cuda"
        )
    if config.amp == "fp16" and device.type == "mps":
        raise ConfigError(
            "--amp fp16 needs CUDA or a CPU, and the device is mps; use bf16 or leave it out", code="amp-fp16-on-mps"
        )
    return device


def require_same_as_leader(world: World, plan: Plan) -> None:
    """Refuse other images, or other options, than the leader has; all processes have to take part.

    Raises:
        DataError: the images differ.
        ConfigError: an option differs.
    """
    data = plan.data
    images = {"training images": data.train.digest, "validation images": data.val.digest}
    options = {name: value for name, value in plan.config.to_dict().items() if name not in OF_ONE_MACHINE}
    leaders_images, leaders_options = world.from_leader((images, options))
    for name, digest in images.items():
        if leaders_images[name] != digest:
            raise DataError(
                f"its {name} differ from those of process 0; give every process the same", code="peers-images-differ"
            )
    for name, value in options.items():
        if leaders_options[name] != value:
            raise ConfigError(
                f"its {option(name)} (={value}) differs from that of process 0 (={leaders_options[name]}); give every "
                "process the same",
                code="peers-options-differ",
            )


def fresh_state(plan: Plan, device: torch.device, world: World, *, fetch_pretrained: bool) -> TrainingState:
    """Return the state before the first iteration.

    Args:
        fetch_pretrained: load the published weights, if they were asked for.
    """
    config = plan.config
    torch.manual_seed(config.seed)
    model = plan.spec.build(config.num_classes, pretrained=fetch_pretrained and config.pretrained)
    model = move_model(model, device)
    if config.sync_bn and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    optimizer = make_optimizer(
        model,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda") and config.amp != "fp16",
    )
    return TrainingState(
        model,
        optimizer,
        make_scheduler(optimizer, config.total_iters),
        device,
        ema=None if config.ema_decay is None else make_ema(model, config.ema_decay),
        scaler=GradScaler(device.type) if config.amp == "fp16" else None,
        seed=config.seed,
        world=world,
    )


def _warn_of_drift(drift: Mapping[str, tuple[Any, Any]], reporter: Reporter) -> None:
    if MICRO_BATCHES in drift:
        then, now = drift[MICRO_BATCHES]
        reporter.warn(
            f"batches are divided into {now} micro-batches, and were into {then}: batch normalisation sees different "
            f"images together, so results differ; {then} processes, or a divisor of {then}, would go on as before"
        )
    listed = [f"{name} ({drift[name][0]} -> {drift[name][1]})" for name in NEEDED_FOR_EQUALITY if name in drift]
    if listed:
        reporter.note(f"since the checkpoint: {', '.join(listed)}; results are equal up to rounding, not bit for bit")


def _load_initial_weights(state: TrainingState, initial: InitialWeights, data: TrainData, reporter: Reporter) -> None:
    """Load the weights of another checkpoint, except for a classifier of other classes.

    Raises:
        CheckpointError: they do not fit the network.
    """
    same_classes = initial.fits_classes(data.train.class_to_idx)
    source = repr(str(initial.path))
    weights = weights_of(initial.payload, source)
    with suggest_fitting_models(weights, source, initial.spec):
        report = load_checkpoint(
            state.model, initial.payload, strict=False, reset_head=True if same_classes else "always", source=source
        )
    reporter.note(f"starting with the weights of {initial.path}")
    if report.reset:
        reporter.note("classifier re-initialised: the file has other classes")
    elif report.reshaped:
        width, classes = classes_in(weights, initial.spec), len(data.train.classes)
        reporter.note(f"classifier re-initialised: {width} classes in the file, {classes} here")
    elif initial.description.class_to_idx is None:
        reporter.note("classifier kept: it has the same width, and the file does not name its classes")
    else:
        reporter.note("classifier kept: the file has the same classes")
