"""The configuration of a training run: as asked for, and with every option decided."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from dataclasses import replace as replaced
from typing import Any, TypeVar, get_args, get_type_hints

from shufflenet_mlflow.config.rules import (
    DEFAULT_BATCH_SIZE,
    REESTIMATION_IMAGES,
    check_batch_to_train,
    check_options,
    format_numbers,
    option,
    require_that,
)
from shufflenet_mlflow.errors import ConfigError

Config = TypeVar("Config", bound="TrainConfig")


def check_types(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if the value of a field of `RunConfig` is of another type; other names are ignored."""
    for name in (*FIELDS, "epochs"):
        if name in values:
            value, expected = values[name], _TYPES[name]
            fits = isinstance(value, expected) and (expected == (bool,) or not isinstance(value, bool))
            require_that(fits, name, repr(value), f"of type {' or '.join(kind.__name__ for kind in expected)}")


def types_of(name: str) -> tuple[type, ...]:
    """Return the types that a value of a field of `RunConfig`, or of `epochs`, may have."""
    return _TYPES[name]


def check_names(options: Mapping[str, Any], *also: str) -> None:
    """Raise ConfigError for names that `TrainConfig` has no field of; the message suggests similar ones.

    Args:
        also: other names that are allowed.
    """
    known = (*_DEFAULTS, *also)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "`help(TrainConfig)` lists them"
            raise ConfigError(f"there is no option {name!r}; {hint}", code="option-unknown")


_WRITTEN = ("choices", "scales", "init_from", "qat", "train_dir", "val_dir", "mean_image", "teacher")


def _as_text(value: Any) -> Any:
    """Return a path, or a list of numbers, as the command line takes it; anything else unchanged."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return format_numbers(value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of a training run: those of `shufflenet train`, with underscores and the same defaults.

    None means that recipe, network or data decide, as the field says; when a run is resumed, each field that has its
    default means what the run has. References and folders may be paths, `choices` and `scales` lists of numbers.

    Raises:
        ConfigError: a value cannot work, or two exclude each other; the message names the option.
    """

    model: str | None = None
    """Name of the network; None: `shufflenet_v2_x0_5`, or the network of `init_from`."""
    choices: str | None = None
    """Branch of each of the network's units, comma-separated; None: the published ones."""
    scales: str | None = None
    """Width of each of the network's units, comma-separated; None: the published ones."""
    init_from: str | None = None
    """Reference of the checkpoint with the initial weights; None: random ones."""
    pretrained: bool = False
    """Start from the weights that torchvision publishes."""
    train_dir: str | None = None
    """Folder or table of training images; None: the bundled digits."""
    val_dir: str | None = None
    """Folder or table of validation images; None: a part of `train_dir`, or the bundled digits."""
    num_classes: int | None = None
    """Width of the classifier, at least the number of classes in the folder; None: the number of classes."""
    input_size: int | None = None
    """Height and width of the network's input, pixels; None: 224, or 64 for the digits."""
    batch_size: int = DEFAULT_BATCH_SIZE
    """Images per iteration."""
    epochs: int | None = None
    """Length of the whole run, passes over the training images, instead of `total_iters`; None: the recipe's, or 20 for
    the digits."""
    total_iters: int | None = None
    """Length of the whole run, iterations; None: as `epochs` says."""
    lr: float | None = None
    """Learning rate at the first iteration, or after the warm-up; `schedule` says how it falls; None: the recipe's,
    scaled to the batch size."""
    momentum: float | None = None
    """Momentum of SGD; AdamW's first beta; None: the recipe's."""
    weight_decay: float | None = None
    """Weight decay of parameters with two or more dimensions; None: the recipe's."""
    label_smooth: float | None = None
    """Share of the target that is spread over all classes; None: the recipe's."""
    seed: int = 0
    """Random seed: initial weights, data order, augmentation, dropout."""
    mean_image: str | None = None
    """File of the mean image that is subtracted from the input; None: a mean per channel, if any. Each
    checkpoint holds the image itself."""
    augment: str | None = None
    """Name of the training augmentation; None: the recipe's; `shift` for the digits."""
    on_bad_image: str = "fail"
    """On an unreadable image: `fail` or `skip`."""
    workers: int | None = None
    """Processes that decode images; 0 decodes in the training process; None: one per core, at most 16; none for the
    digits or a few images."""
    threads: int | None = None
    """Threads that compute on the CPU; results depend on it in their last bits; None: as many cores as the network
    keeps busy."""
    device: str = "auto"
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N`."""
    display_interval: int = 20
    """Iterations between two lines of progress and two metric points."""
    val_interval: int | None = None
    """Iterations between two passes over the validation set; None: about 10 validations per run."""
    save_interval: int | None = None
    """Iterations between two checkpoints; None: about 10 checkpoints per run."""
    keep_last: int | None = None
    """Keep this many of the newest checkpoints. Without this rule or one of the next two, all are kept."""
    keep_best: int | None = None
    """Keep this many of the checkpoints with the highest validation accuracy."""
    keep_every: int | None = None
    """Keep the checkpoints whose iteration is a multiple of this."""
    on_save_error: str = "fail"
    """On a checkpoint that cannot be written: `fail` or `continue`."""
    ema_decay: float | None = None
    """Decay per iteration of a moving average of the weights, which is then what validation and evaluation measure; 0:
    no average; None: the recipe's."""
    micro_batch_size: int | None = None
    """Most images per forward pass, over which batch normalisation averages; None: the whole batch."""
    sync_bn: bool = False
    """Batch normalisation averages over the images of all processes; needs CUDA."""
    amp: str = "off"
    """Mixed precision in training: `off`, `bf16`, or `fp16` with a loss scaler. Evaluation is in full precision."""
    compile: bool = False
    """Train the network with `torch.compile`: other rounding, minutes of compilation, then possibly faster steps."""
    recipe: str = "paper"
    """Set of defaults for what the recipe decides: `paper`, `finetune` or `modern`; `shufflenet recipes` shows them."""
    optimizer: str | None = None
    """`sgd` or `adamw`; None: the recipe's."""
    schedule: str | None = None
    """How the learning rate falls after the warm-up: `linear` or `cosine`, both to 0, or `constant`; None: the
    recipe's."""
    warmup_epochs: float | None = None
    """Epochs, or a fraction of one, in which the learning rate rises linearly to `lr`; None: the recipe's."""
    clip_norm: float | None = None
    """Largest norm of all gradients together; 0: any; None: the recipe's."""
    erasing: float | None = None
    """Probability that a rectangle of a training image is erased; None: the recipe's."""
    mixup: float | None = None
    """Alpha of mixup: each image is blended with another one; 0: none is. With `cutmix`, one of the two by turns; None:
    the recipe's."""
    cutmix: float | None = None
    """Alpha of CutMix: a rectangle of each image is replaced by another image's; 0: none is; None: the recipe's."""
    balance: str | None = None
    """Balancing of classes of different sizes: `weights` of the loss, a `sampler` that draws all classes equally often,
    or `none`; None: the recipe's."""
    freeze: str | None = None
    """Parts that stay as they are: `backbone`, all but the classifier; a number N, the stem and the first N stages; or
    `none`; None: the recipe's."""
    head_lr_factor: float | None = None
    """Factor of the classifier's learning rate; None: the recipe's."""
    layer_decay: float | None = None
    """Factor of the learning rate from each part of the network to the part before it: stem, each stage, what
    follows, classifier; None: the recipe's."""
    patience: int | None = None
    """End training after this many validations without an improvement; 0: train to the end; None: the recipe's, 0."""
    teacher: str | None = None
    """Reference of the checkpoint to distil from; None: none."""
    qat: str | None = None
    """Reference of the checkpoint to fine-tune with fake quantisation, for export to int8; None: none."""
    bn_images: int = REESTIMATION_IMAGES
    """Training images, at most, from which the statistics of batch normalisation are re-estimated in the end."""
    val_fraction: float | None = None
    """Share of `train_dir` that is for validation; None: 0.2, unless `val_dir` or a table says which images are."""
    group_by: str | None = None
    """Regular expression: images in whose paths it finds the same are not divided; None: each stands alone."""

    def __post_init__(self) -> None:
        for name in _WRITTEN:
            object.__setattr__(self, name, _as_text(getattr(self, name)))
        given = {name: value for name, value in asdict(self).items() if value is not None}
        check_types(given)
        check_batch_to_train(self.batch_size)
        check_options(given)

    def given(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        return {entry.name: getattr(self, entry.name) for entry in fields(TrainConfig) if self._differs(entry.name)}

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != _DEFAULTS[name])

    def replace(self: Config, **changes: Any) -> Config:
        """Return a copy with some fields changed.

        Raises:
            ConfigError: a value cannot work, or there is no such field.
        """
        check_names(changes)
        return replaced(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build from the output of `to_dict`, or from the entry `config` of a checkpoint.

        Raises:
            ConfigError: a value cannot work, or there is no such field; the message suggests similar ones.
        """
        check_names(values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """A training run with every option decided, as stored in its checkpoints and as `config.json`.

    Paths are absolute. The defaults are those of configurations that lack the field, which an earlier version wrote.
    """

    model: str = field()
    choices: str | None = field()
    scales: str | None = field()
    init_from: str | None = field()
    train_dir: str | None = field()
    val_dir: str | None = field()
    mean_image: str | None = field()
    pretrained: bool = field()
    num_classes: int = field()
    input_size: int = field()
    batch_size: int = field()
    total_iters: int = field()
    lr: float = field()
    momentum: float = field()
    weight_decay: float = field()
    label_smooth: float = field()
    seed: int = field()
    augment: str = field()
    on_bad_image: str = field()
    workers: int = field()
    device: str = field()
    display_interval: int = field()
    val_interval: int = field()
    save_interval: int = field()
    optimizer: str = "sgd"
    schedule: str = "linear"
    warmup_epochs: float = 0.0
    clip_norm: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    balance: str = "none"
    freeze: str = "none"
    head_lr_factor: float = 1.0
    layer_decay: float = 1.0
    patience: int = 0

    def __post_init__(self) -> None:
        values = self.to_dict()
        check_types(values)
        check_batch_to_train(self.batch_size)
        check_options(values)

    def warmup_iters(self, iters_per_epoch: int) -> int:
        """Return the length of the warm-up in iterations."""
        return round(self.warmup_epochs * iters_per_epoch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field; without `epochs`, since `total_iters` is known."""
        return {name: value for name, value in asdict(self).items() if name != "epochs"}


FIELDS = tuple(entry.name for entry in fields(RunConfig) if entry.name != "epochs")
"""The fields that every configuration has once it is decided."""

_DEFAULTS: dict[str, Any] = {entry.name: entry.default for entry in fields(TrainConfig)}

FIXED_DEFAULTS: dict[str, Any] = {name: value for name, value in _DEFAULTS.items() if value is not None}
"""Field -> its value if it is not given, where neither recipe nor network nor data decide it."""

DEFAULTS: dict[str, Any] = {
    entry.name: entry.default for entry in fields(RunConfig) if entry.default is not MISSING and entry.name in FIELDS
}
"""Field -> its value in configurations that lack it, which an earlier version wrote."""

_TYPES: dict[str, tuple[type, ...]] = {
    name: (float, int, *get_args(hint)[1:]) if hint is float or float in get_args(hint) else get_args(hint) or (hint,)
    for name, hint in {**get_type_hints(RunConfig), "epochs": int}.items()
}
"""Field -> types of its values. A whole number may stand for a fraction."""


def weights_ref(options: Mapping[str, Any]) -> str | None:
    """Return the reference of the checkpoint whose weights a training begins with; None for others."""
    ref: str | None = options.get("qat") or options.get("init_from")
    return ref


def command_of(config: Mapping[str, Any]) -> list[str]:
    """Return the options of `shufflenet train` that repeat this configuration, every one of them explicit."""
    words = []
    for name, value in config.items():
        if name not in FIELDS:
            continue
        if value is True:
            words.append(option(name))
        elif value is not None and value is not False:
            words += [option(name), str(value)]
    return words
