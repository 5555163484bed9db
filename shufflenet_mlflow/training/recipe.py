"""Recipes: the published settings of the families, and named sets of options. No torch is imported here.

A family's settings are those of the original release's training scripts: SGD with momentum 0.9, weight decay 4e-5,
label smoothing 0.1, a learning rate of 0.5 at batch size 1,024 that falls linearly to 0 over 300,000 iterations, then
BN statistics averaged over 1,280,000 images. V2+ and Large deviate in learning rate, batch size and length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE, DEFAULTS, FIELDS, FIXED_DEFAULTS, RunConfig
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.models.catalog import find_network


@dataclass(frozen=True)
class Recipe:
    """A family's published training settings."""

    batch_size: int
    lr: float
    """Learning rate at `batch_size`; it is scaled in proportion to the batch size."""
    total_iters: int
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smooth: float = 0.1
    train_images: int = 1_280_000
    """Size of ImageNet-1k as the release counts it."""
    augment: str = "release"
    """A name in `shufflenet_mlflow.data.augment.AUGMENTATIONS`."""

    @property
    def epochs(self) -> int:
        """Passes over ImageNet-1k in `total_iters` iterations."""
        return round(self.total_iters * self.batch_size / self.train_images)

    def scaled_lr(self, batch_size: int) -> float:
        """Return the learning rate for batches of `batch_size`."""
        return self.lr * batch_size / self.batch_size


_V2 = Recipe(batch_size=1024, lr=0.5, total_iters=300_000)
_LARGE = Recipe(batch_size=256, lr=0.25, total_iters=600_000, augment="lighting")

RECIPES: dict[str, Recipe] = {
    "v1": _V2,
    "v2": _V2,
    "v2_plus": replace(_V2, total_iters=450_000),
    "oneshot": _V2,
    **dict.fromkeys(("oneshot_supernet", "channel_supernet"), replace(_V2, total_iters=150_000)),
    "detnas": _V2,
    "large": _LARGE,
    "exlarge": replace(_LARGE, augment="release"),  # no recipe was published: Large's, without its lighting noise
    "torchvision": _V2,  # not torchvision's own
    "registered": _V2,  # of other packages, which say nothing of training
}


def get_recipe(model: str) -> Recipe:
    """Return the recipe of a network's family.

    Raises:
        ModelError: there is no network `model`.
    """
    return RECIPES[find_network(model).family]


@dataclass(frozen=True)
class NamedRecipe:
    """A set of options that `--recipe` names; the options that it leaves out are the family's."""

    summary: str
    options: Mapping[str, Any]
    lr_share: float | None = None
    """Learning rate over the family's own."""
    lr: float | None = None
    """Learning rate for batches of `DEFAULT_BATCH_SIZE`. It grows with the square root of the batch size: AdamW's steps
    do not shrink with the noise of their gradients (Malladi et al., 2022)."""
    in_short_runs: Mapping[str, Any] = field(default_factory=dict)
    """Options of runs of `SHORT_RUN_EPOCHS` epochs and fewer, which gain more from images that are easier to learn."""


SHORT_RUN_EPOCHS = 10
QAT_RECIPE = "qat"

NAMED_RECIPES: dict[str, NamedRecipe] = {
    "paper": NamedRecipe("as the networks were published", {}),
    "finetune": NamedRecipe(
        "for --init-from and --pretrained: careful with the weights that are there",
        {
            "epochs": 30,
            "schedule": "cosine",
            "warmup_epochs": 1.0,
            "head_lr_factor": 10.0,
        },
        lr_share=0.1,
    ),
    "modern": NamedRecipe(
        f"from scratch, with AdamW; runs of {SHORT_RUN_EPOCHS} epochs and fewer have --augment shift",
        {
            "optimizer": "adamw",
            "schedule": "cosine",
            "warmup_epochs": 5.0,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
        },
        lr=1e-3,
        in_short_runs={"augment": "shift"},
    ),
    QAT_RECIPE: NamedRecipe(
        "for --qat, which has it by default: small steps, from trained weights",
        {"epochs": 5, "schedule": "cosine"},
        lr_share=0.003,
    ),
}

DECIDED = (
    *("epochs", "optimizer", "lr", "momentum", "weight_decay", "schedule", "warmup_epochs", "clip_norm", "layer_decay"),
    *("head_lr_factor", "freeze", "augment", "erasing", "mixup", "cutmix", "balance", "label_smooth", "ema_decay"),
    "patience",
)
"""The options that a recipe decides, as they are listed."""

WARMUP_AT_MOST = 0.1
"""Share of a run that a recipe's own warm-up takes at most."""

VALIDATIONS = 10
"""By default a run is validated, and saved, about this often, and at most once per epoch."""


def recipe_options(name: str, model: str, batch_size: int, epochs: float | None = None) -> dict[str, Any]:
    """Return the options that a recipe decides, for this network and batch size.

    Args:
        epochs: length of the run, if it is known.

    Raises:
        ModelError: there is no network `model`.
    """
    family, named = get_recipe(model), NAMED_RECIPES[name]
    lr = family.scaled_lr(batch_size) * (named.lr_share or 1)
    if named.lr is not None:
        lr = named.lr * math.sqrt(batch_size / DEFAULT_BATCH_SIZE)
    values = {
        **{option: DEFAULTS[option] for option in DECIDED if option in DEFAULTS},
        "epochs": family.epochs,
        "momentum": family.momentum,
        "weight_decay": family.weight_decay,
        "label_smooth": family.label_smooth,
        "augment": family.augment,
        "lr": lr,
        **named.options,
    }
    if epochs is not None and epochs <= SHORT_RUN_EPOCHS:
        values |= named.in_short_runs
    return {option: values[option] for option in DECIDED}


def run_defaults(recipe: Mapping[str, Any], total_iters: int, iters_per_epoch: int) -> dict[str, Any]:
    """Return the values of options that are not given and that depend on no data.

    Args:
        recipe: the result of `recipe_options`.
    """
    interval = max(1, -(-total_iters // (VALIDATIONS * iters_per_epoch))) * iters_per_epoch
    return {
        **FIXED_DEFAULTS,
        **{name: value for name, value in recipe.items() if name in FIELDS},
        "warmup_epochs": min(recipe["warmup_epochs"], WARMUP_AT_MOST * total_iters / iters_per_epoch),
        "val_interval": interval,
        "save_interval": interval,
    }


def check_warmup(config: RunConfig, iters_per_epoch: int) -> None:
    """Raise ConfigError if the warm-up does not end before the run does."""
    if config.warmup_iters(iters_per_epoch) >= config.total_iters:
        raise ConfigError(
            f"--warmup-epochs (={config.warmup_epochs}) must be below the length of the run, "
            f"{config.total_iters / iters_per_epoch:g} epochs",
            code="warmup-too-long",
        )
