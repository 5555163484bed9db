"""A training run made ready: options, data and state that fit the checkpoint, and those of the other processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from shufflenet_mlflow.checkpoints.loading import load_checkpoint, weights_of
from shufflenet_mlflow.config import check_resumable, option
from shufflenet_mlflow.errors import ConfigError, DataError
from shufflenet_mlflow.models.loaded import classes_in, suggest_fitting_models
from shufflenet_mlflow.runtime.devices import choose_device, keep_freed_memory, move_model
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.training.loop import TrainData, Trainer
from shufflenet_mlflow.training.recipe import make_ema, make_optimizer, make_scheduler
from shufflenet_mlflow.training.state import TrainingState
from shufflenet_mlflow.workflows.training.config import Plan, plan
from shufflenet_mlflow.workflows.training.data import check_same_data
from shufflenet_mlflow.workflows.training.description import (
    NEEDED_FOR_EQUALITY,
    PARTS,
    constants,
    drift_since,
    environment,
)
from shufflenet_mlflow.workflows.training.followers import NoMetrics, NoStore
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import InitialWeights, ResumePoint

OF_ONE_MACHINE = ("train_dir", "val_dir", "mean_image", "init_from", "workers", "device")
"""Options in which the processes of one job may differ."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train."""

    planned: Plan
    state: TrainingState
    world: World
    environment: Mapping[str, Any]
    drifted: Mapping[str, tuple[Any, Any]]
    """What has changed since the checkpoint was written."""


def prepare(
    world: World,
    request: TrainRequest,
    start: ResumePoint | None,
    init: InitialWeights | None,
    reporter: Reporter,
    stop: StopFlag,
) -> Prepared:
    """Options, data and state of this process, which fit those of the others.

    Raises:
        ConfigError, ModelError, DataError: options or images that cannot work, or are not those of process 0.
        ResumeError: the checkpoint's run cannot be continued with them.
        CheckpointError: the weights to begin with do not fit the network.
    """
    with world.sync_errors(stop), stop.at_once():
        planned = plan(request, start, init, world)
        config, data = planned.config, planned.data
        if len(data.train.classes) == 1:
            reporter.note(f"{str(data.train.root)!r} has one class only: there is nothing to tell apart")
        if config.train_dir is not None and config.train_dir == config.val_dir:
            reporter.warn("--train-dir and --val-dir are one folder: its validation says nothing of other images")
        if request.inherited:
            check_resumable(request.inherited, config, new_run=False)
        if start is not None:
            check_resumable(start.config, config, new_run=request.new_run)
            check_same_data(start, data, new_run=request.new_run)
        device = choose_device(world.device(config.device))
        keep_freed_memory(device)
        if config.sync_bn and device.type != "cuda":
            raise ConfigError(
                f"--sync-bn needs CUDA, and the device is {device.type}; leave it out", code="sync-bn-needs-cuda"
            )
        if config.amp == "fp16" and device.type == "mps":
            raise ConfigError(
                "--amp fp16 needs CUDA or a CPU, and the device is mps; use bf16 or leave it out",
                code="amp-fp16-on-mps",
            )
        surroundings = environment(planned, device, world)
    with world.sync_errors(stop):
        _require_same_as_leader(world, planned)
    with world.sync_errors(stop), stop.at_once():
        drifted: dict[str, tuple[Any, Any]] = {}
        state = fresh_state(planned, device, world, first_weights=start is None)
        if start is not None:
            state.load_state_dict(start.payload, config)
            drifted = drift_since(start, config, surroundings)
            _warn_of_drift(drifted, reporter)
        if init is not None:
            _load_first_weights(state, init, data, reporter)
    return Prepared(planned, state, world, surroundings, drifted)


def _require_same_as_leader(world: World, planned: Plan) -> None:
    """Raise DataError or ConfigError where this process was given other images, or other options, than the leader."""
    data = planned.data
    images = {"training images": data.train.digest, "validation images": data.val.digest}
    options = {name: value for name, value in planned.config.to_dict().items() if name not in OF_ONE_MACHINE}
    leaders_images, leaders_options = world.from_leader((images, options))
    for what, digest in images.items():
        if leaders_images[what] != digest:
            raise DataError(
                f"its {what} are not those of process 0; give every process the same", code="peers-images-differ"
            )
    for name, value in options.items():
        if leaders_options[name] != value:
            raise ConfigError(
                f"its {option(name)} (={value}) is not that of process 0 (={leaders_options[name]}); give every "
                "process the same",
                code="peers-options-differ",
            )


def _warn_of_drift(drifted: Mapping[str, tuple[Any, Any]], reporter: Reporter) -> None:
    if PARTS in drifted:
        then, now = drifted[PARTS]
        reporter.warn(
            f"batches are divided into {now} parts, and were into {then}: batch normalisation sees other images "
            f"together, so results differ; {then} processes, or a number that divides {then}, would go on as before"
        )
    listed = [f"{name} ({drifted[name][0]} -> {drifted[name][1]})" for name in NEEDED_FOR_EQUALITY if name in drifted]
    if listed:
        reporter.note(f"since the checkpoint: {', '.join(listed)}; results are equal but for rounding, not bit for bit")


def fresh_state(planned: Plan, device: torch.device, world: World, *, first_weights: bool) -> TrainingState:
    """The state before the first iteration.

    Args:
        first_weights: fetch the published weights, if they were asked for.
    """
    config = planned.config
    torch.manual_seed(config.seed)
    pretrained = first_weights and config.pretrained
    model = planned.architecture.build(config.num_classes, pretrained=pretrained)
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


def _load_first_weights(state: TrainingState, init: InitialWeights, data: TrainData, reporter: Reporter) -> None:
    """Take over the weights of `init`, but for a classifier of other classes.

    Raises:
        CheckpointError: they do not fit the network.
    """
    same = init.fits_classes(data.train.class_to_idx)
    source = repr(str(init.path))
    weights = weights_of(init.payload, source)
    with suggest_fitting_models(weights, source, init.architecture):
        report = load_checkpoint(
            state.model, init.payload, strict=False, reset_head=True if same else "always", source=source
        )
    reporter.note(f"begins with the weights of {init.path}")
    if report.reset:
        reporter.note("its classifier begins anew: the file is of other classes")
    elif report.reshaped:
        widths = classes_in(weights, init.architecture), len(data.train.classes)
        reporter.note(f"its classifier begins anew: {widths[0]} classes in the file, {widths[1]} here")
    elif init.described.class_to_idx is None:
        reporter.note("it does not name its classes: its classifier, of the same width, is kept")
    else:
        reporter.note("its classifier, of the same classes, is kept")


def bare_trainer(planned: Plan, *, reporter: Reporter, stop: StopFlag) -> Trainer:
    """The loop of that run in this process alone, from its beginning, with nothing kept: to measure it."""
    world = World()
    device = choose_device(planned.config.device)
    keep_freed_memory(device)
    return Trainer(
        config=planned.config,
        data=planned.data,
        state=fresh_state(planned, device, world, first_weights=False),
        constants=constants(planned, environment(planned, device, world)),
        store=NoStore(),
        sink=NoMetrics(),
        reporter=reporter,
        stop=stop,
        world=world,
    )
