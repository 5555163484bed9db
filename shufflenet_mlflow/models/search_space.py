"""The search space of Single Path One-Shot (Guo et al., 2019, arXiv:1904.00420): what a unit's branch and width can be.

No torch is imported here, so that the command line can report wrong choices and scales at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shufflenet_mlflow.config import format_numbers
from shufflenet_mlflow.errors import ModelError

STAGE_UNITS = (4, 4, 8, 4)
UNITS = sum(STAGE_UNITS)
STAGE_WIDTHS = (64, 160, 320, 640)
BRANCHES = 4
"""Kernels of 3, 5 and 7, and the Xception branch."""

WIDTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Scales that a channel search chooses from (arXiv:1904.00420); the list of the release ends at 1.6."""

SUPERNET = "shufflenet_oneshot_supernet"
"""Name of the network whose paths are the networks of this space with scales of 1."""
CHANNEL_SUPERNET = "shufflenet_oneshot_channel_supernet"
"""Name of the network whose paths are the networks of this space with scales in `WIDTHS`."""
SUPERNETS = (SUPERNET, CHANNEL_SUPERNET)
NETWORK = "shufflenet_oneshot"
"""Name of one network of this space."""

SMALLEST_SCALE = 2 / STAGE_WIDTHS[0]
"""Leaves the narrowest unit one channel."""
LARGEST_SCALE = WIDTHS[-1]
"""A number above it is an index into the search space, mistaken for a scale."""

SEARCHED_CHOICES = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
"""The published network with searched branches and scales of 1 (table 4); a supernet's path outside of training."""

CHOICES = (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)
SCALES = (1.4, 1.2, 0.8, 1.2, 0.6, 1.4, 0.8, 1.0, 0.6, 1.2, 1.6, 1.2, 1.0, 1.4, 1.6, 1.0, 1.0, 1.2, 1.0, 0.8)

Genes = tuple[int, ...]
"""A network as a search draws it: 20 choices and, in a channel search, 20 indices into `WIDTHS` after them."""


def inner_width(out_channels: int, scale: float) -> int:
    """Return the channels inside a unit's branch.

    Args:
        out_channels: of the unit.
        scale: the factor of half of them.
    """
    return int(out_channels // 2 * scale)


def check_choices(choices: Sequence[int]) -> None:
    """Raise ModelError unless `choices` holds 20 integers from 0 to 3."""
    if len(choices) != UNITS:
        raise ModelError(f"choices: there are {len(choices)}, not {UNITS}, one per unit", code="choices-count")
    for choice in choices:
        if type(choice) is not int or choice not in range(BRANCHES):
            raise ModelError(
                f"choices: {choice!r} is none of 0, 1, 2 (kernels 3, 5, 7) and 3 (Xception)", code="choices-value"
            )


def check_scales(scales: Sequence[float]) -> None:
    """Raise ModelError unless `scales` holds 20 factors that leave each unit some width."""
    if len(scales) != UNITS:
        raise ModelError(f"scales: there are {len(scales)}, not {UNITS}, one per unit", code="scales-count")
    for scale in scales:
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            raise ModelError(
                f"scales: {scale!r} is not a factor of {SMALLEST_SCALE} to {LARGEST_SCALE}; the search space has "
                "0.2, 0.4 … 2.0 (the factors themselves, not their indices)",
                code="scales-value",
            )


def complete(
    choices: Sequence[int] | None, scales: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return both, the missing one filled in: the published one, or scales of 1 where only choices are given.

    Raises:
        ModelError: there are not 20 of each, or one is outside the search space.
    """
    if scales is None:
        scales = SCALES if choices is None else (1.0,) * UNITS
    choices = CHOICES if choices is None else choices
    check_choices(choices)
    check_scales(scales)
    return tuple(choices), tuple(map(float, scales))


def genes_of(choices: Sequence[int], scales: Sequence[float] | None = None) -> Genes:
    """Return the genes of a network; the inverse of `network_of`.

    Raises:
        ModelError: there are not 20 of each, or one is outside the search space.
        ValueError: a scale is none of `WIDTHS`.
    """
    check_choices(choices)
    if scales is None:
        return tuple(choices)
    check_scales(scales)
    return (*choices, *(WIDTHS.index(scale) for scale in scales))


def network_of(genes: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Return the choices of a network, and its scales if a channel search has drawn it."""
    choices, widths = tuple(genes[:UNITS]), genes[UNITS:]
    return choices, tuple(WIDTHS[width] for width in widths) if widths else None


def options_of(genes: Sequence[int]) -> dict[str, str]:
    """Return the options of training that name a network: `choices`, and `scales` if a channel search has drawn it."""
    choices, scales = network_of(genes)
    options = {"choices": format_numbers(choices)}
    return options if scales is None else {**options, "scales": format_numbers(scales)}


def genes_in(entry: Mapping[str, Any]) -> Genes:
    """Return the genes that such options stand for; other entries are ignored.

    Raises:
        KeyError, ValueError, AttributeError: there are no choices, or they are no text of numbers.
        ModelError: as `genes_of`.
    """
    scales = [float(scale) for scale in entry["scales"].split(",")] if "scales" in entry else None
    return genes_of([int(choice) for choice in entry["choices"].split(",")], scales)
