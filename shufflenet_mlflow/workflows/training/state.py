"""The training state before the first iteration: fresh, resumed, or with another checkpoint's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shufflenet_mlflow.checkpoints.loading import load_checkpoint, weights_of
from shufflenet_mlflow.checkpoints.schema import is_own
from shufflenet_mlflow.config import RunConfig, option
from shufflenet_mlflow.data.calibration import CALIBRATION_IMAGES, calibration_pixels
from shufflenet_mlflow.data.folder import same_names
from shufflenet_mlflow.data.preprocess import ToInput
from shufflenet_mlflow.errors import CheckpointError, ConfigError, DataError, ResumeError
from shufflenet_mlflow.models.fake_quantize import calibrate, scales_of
from shufflenet_mlflow.models.loaded import classes_in, model_from_payload, suggest_fitting_models
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, keep_freed_memory, move_model
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.text import counted, name_some
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.training.distillation import Teacher, digest_of
from shufflenet_mlflow.training.state import TrainingState
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan
from shufflenet_mlflow.workflows.training.description import (
    MICRO_BATCHES,
    NEEDED_FOR_EQUALITY,
    drift_since,
    environment,
)
from shufflenet_mlflow.workflows.training.resume import InitialWeights, TeacherPoint

_CALIBRATION_BATCH = 30

OF_ONE_MACHINE = ("train_dir", "val_dir", "mean_image", "init_from", "qat", "teacher", "workers", "threads", "device")
"""Options in which the processes of one job may differ."""


@dataclass(frozen=True)
class PreparedState:
    """A training state, and what its results depend on besides the configuration."""

    state: TrainingState
    environment: Mapping[str, Any]
    drift: Mapping[str, tuple[Any, Any]]
    """Changes since the checkpoint was written: name -> (then, now)."""
    teacher: Teacher | None = None
    teacher_digest: str | None = None


def prepare_state(plan: Plan, attempt: Attempt, context: JobContext) -> PreparedState:
    """Build the training state, and load what the attempt continues.

    Raises:
        ConfigError: the device, the network or the teacher cannot do what the options ask for.
        CheckpointError: the weights do not fit the network.
        ResumeError: the teacher is not the one that the run began with.
    """
    config, reporter = plan.config, context.reporter
    device = usable_device(config, context.world)
    keep_freed_memory(device)
    surroundings = environment(plan, device, context.world)
    point, weights = attempt.resume_point, attempt.initial_weights
    drift: dict[str, tuple[Any, Any]] = {}
    state = fresh_state(plan, device, context.world, fetch_pretrained=point is None)
    teacher = _make_teacher(attempt.teacher_point, plan, device)
    teacher_digest = digest_of(teacher) if teacher is not None else None
    if point is not None:
        if not attempt.is_fork and point.payload.get("teacher") != teacher_digest:
            raise ResumeError(
                f"--teacher (={config.teacher}) is not the one that the run began with; leave it out, or pass "
                "--new-run",
                code="teacher-changed",
            )
        state.load_state_dict(point.payload)
        if attempt.is_fork:
            state.best, state.validations_since_best = None, 0  # the other run has that checkpoint
        drift = drift_since(point, plan, surroundings)
        _warn_of_drift(drift, reporter)
    if weights is not None:
        _load_initial_weights(state, weights, plan.data, reporter)
        if plan.spec.fake_quantized:
            _calibrate(state, plan.data, reporter)
    elif config.freeze != "none" and point is None and not config.pretrained:
        reporter.warn(
            f"--freeze (={config.freeze}) without --init-from or --pretrained: what is frozen keeps its random weights"
        )
    return PreparedState(state, surroundings, drift, teacher, teacher_digest)


def _make_teacher(point: TeacherPoint | None, plan: Plan, device: torch.device) -> Teacher | None:
    """Return the network to distil from; None without one.

    Raises:
        ConfigError: its classes are not those of the training images.
        CheckpointError: it does not describe its network.
    """
    if point is None:
        return None
    source = f"--teacher {str(point.path)!r}"
    if not is_own(point.payload) or "model" not in point.payload:
        raise CheckpointError(
            f"{source} does not describe its network; name a checkpoint that this project's training wrote",
            code="teacher-not-described",
        )
    network = model_from_payload(point.payload, source)
    classes = plan.data.train.class_to_idx
    names = network.class_to_idx
    same = len(classes) == network.num_classes if names is None else same_names(names, classes)
    if not same:
        raise ConfigError(
            f"{source} has other classes ({name_some(network.labels)}) than the training images "
            f"({name_some(list(classes))}); name a checkpoint of the same classes",
            code="teacher-classes-differ",
        )
    return Teacher(network, classes, plan.data.preprocess, device)


def usable_device(config: RunConfig, world: World) -> torch.device:
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
    return TrainingState.of(config, model, device, plan.data.order.iters_per_epoch, world=world)


def _warn_of_drift(drift: Mapping[str, tuple[Any, Any]], reporter: Reporter) -> None:
    then, now = drift.get(MICRO_BATCHES, (None, None))
    if type(then) is int and type(now) is int:
        reporter.warn(
            f"batches are divided into {counted(now, 'micro-batch', 'micro-batches')}, and were into {then}: batch "
            "normalisation sees different images together, so results differ; "
            f"{counted(then, 'process', 'processes')}, or a divisor of {then}, would go on as before"
        )
    listed = [f"{name} ({drift[name][0]} -> {drift[name][1]})" for name in NEEDED_FOR_EQUALITY if name in drift]
    if listed:
        reporter.note(f"since the checkpoint: {', '.join(listed)}; results are equal up to rounding, not bit for bit")


def _calibrate(state: TrainingState, data: TrainData, reporter: Reporter) -> None:
    """Set the scales of the activations of a network with fake quantisation, from training images.

    Raises:
        DataError: none can be read.
    """
    pixels = calibration_pixels(data.train, data.preprocess, CALIBRATION_IMAGES, reporter)
    to_input = ToInput(data.preprocess, state.device)
    calibrate(state.model, lambda: map(to_input, torch.split(pixels, _CALIBRATION_BATCH)))


def _load_initial_weights(state: TrainingState, initial: InitialWeights, data: TrainData, reporter: Reporter) -> None:
    """Load the weights of another checkpoint, except for a classifier of other classes.

    Raises:
        ConfigError: it is to be quantised, and has other classes.
        CheckpointError: they do not fit the network.
    """
    same_classes = initial.fits_classes(data.train.class_to_idx)
    source = repr(str(initial.path))
    if initial.spec.fake_quantized and not same_classes:
        raise ConfigError(
            f"--qat: {source} has other classes than {str(data.train.source)!r}; train it with --init-from first",
            code="qat-other-classes",
        )
    weights = weights_of(initial.payload, source)
    if initial.spec.fake_quantized:
        weights = {**scales_of(state.model), **weights}
    with suggest_fitting_models(weights, source, initial.spec):
        report = load_checkpoint(
            state.model, weights, strict=False, reset_head=True if same_classes else "always", source=source
        )
    reporter.note(f"starting with the weights of {initial.path}")
    if report.reset:
        reporter.note("classifier re-initialised: the file has other classes")
    elif report.reshaped:
        width, classes = classes_in(weights, initial.spec), len(data.train.classes)
        reporter.note(f"classifier re-initialised: {counted(width, 'class', 'classes')} in the file, {classes} here")
    elif initial.description.class_to_idx is None:
        reporter.note("classifier kept: it has the same width, and the file does not name its classes")
    else:
        reporter.note("classifier kept: the file has the same classes")
