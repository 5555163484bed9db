"""The inputs that networks of the series expect. No torch is imported here."""

from dataclasses import dataclass
from typing import Literal

REFERENCE_SIZE = 224
"""Input size, pixels, that the published figures belong to."""


@dataclass(frozen=True)
class Mode:
    """A network's input: channel order, and (x - mean) / std on the 0-255 scale."""

    channels: Literal["BGR", "RGB"]
    mean: tuple[float, float, float] | None = None
    """Per channel, in the order of `channels`."""
    std: tuple[float, float, float] | None = None
    resize: int = 256
    """Shorter side before the centre crop, for a crop of `REFERENCE_SIZE` pixels."""
    antialias: bool = False
    """Whether resizing averages over the pixels that it drops."""
    takes_mean_image: bool = False
    """Whether a mean image may replace `mean`."""


_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)

MODES: dict[str, Mode] = {
    "bgr255": Mode("BGR"),
    "bgr255_mean": Mode("BGR", mean=_IMAGENET_MEAN[::-1], takes_mean_image=True),
    "rgb_256": Mode("RGB", _IMAGENET_MEAN, _IMAGENET_STD, antialias=True),
    "rgb_232": Mode("RGB", _IMAGENET_MEAN, _IMAGENET_STD, resize=232, antialias=True),
}
