"""The networks: one table of variants, `create_model` to build one, `list_models` to name them all."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from shufflenet_mlflow.errors import ModelError
from shufflenet_mlflow.models import oneshot, shufflenet_v2


@dataclass(frozen=True)
class Variant:
    """One row of the table: how to build a network, and what was published about it."""

    name: str
    family: str
    build: Callable[[str, int], nn.Module]
    """(name, num_classes) -> the network."""
    top1_error: float
    """Published ImageNet-1k top-1 error of the released weights, percent."""
    top5_error: float
    """Published ImageNet-1k top-5 error of the released weights, percent."""
    preprocess: str = "bgr255"
    """The mode of `shufflenet_mlflow.data.preprocess` that the released weights expect."""


# Errors: the README files of the original release.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("shufflenet_v2_x0_5", "v2", shufflenet_v2.build, 38.9, 17.4),
        Variant("shufflenet_v2_x1_0", "v2", shufflenet_v2.build, 30.6, 11.1),
        Variant("shufflenet_v2_x1_5", "v2", shufflenet_v2.build, 27.4, 9.4),
        Variant("shufflenet_v2_x2_0", "v2", shufflenet_v2.build, 25.0, 7.6),
        Variant("shufflenet_oneshot", "oneshot", oneshot.build, 25.1, 8.0),
    )
}


def list_models() -> list[str]:
    """The names that `create_model` takes, in the table's order."""
    return list(VARIANTS)


def get_variant(name: str) -> Variant:
    """The table's row for `name`.

    Raises:
        ModelError: no such network; the message suggests the nearest names.
    """
    try:
        return VARIANTS[name]
    except KeyError:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`shufflenet models` lists them."
        raise ModelError(f"there is no network {name!r}; {hint}") from None


def create_model(name: str, num_classes: int = 1000) -> nn.Module:
    """Build the network `name` with freshly drawn weights.

    The network maps (N, 3, H, W) float images, H and W multiples of 32, to (N, num_classes) logits.
    The original release's weights fit it key for key.

    Raises:
        ModelError: no such network, or `num_classes` is below 1.
    """
    variant = get_variant(name)
    if num_classes < 1:
        raise ModelError(f"num_classes (={num_classes}) must be at least 1")
    return variant.build(name, num_classes)
