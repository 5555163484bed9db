"""The inputs that networks of the series expect. No torch is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

REFERENCE_SIZE = 224
"""Input size, pixels, that the published figures belong to."""


@dataclass(frozen=True)
class Mode:
    """A network's input: channel order, and (x - mean) / std on the 0-255 scale."""

    channels: Literal["BGR", "RGB"]
    mean: tuple[float, float, float] | None = None
    """Per channel, in the order of `channels`."""
    std: tuple[float, float, float] | None = None
    resize: float = 256
    """Shorter side before the centre crop, for a crop of `REFERENCE_SIZE` pixels."""
    antialias: bool = False
    """Whether resizing averages over the pixels that it drops."""
    takes_mean_image: bool = False
    """Whether a mean image may replace `mean`."""

    def to_dict(self, input_size: int) -> dict[str, Any]:
        """Return plain values that `from_dict` reads; mean and standard deviation are on the 0-1 scale.

        Args:
            input_size: pixels; `resize` is given for a crop of this size.
        """
        return {
            "channels": self.channels,
            "mean": [value / _WHITE for value in self.mean or (0.0, 0.0, 0.0)],
            "std": [value / _WHITE for value in self.std or (1.0, 1.0, 1.0)],
            "resize": int(input_size * self.resize / REFERENCE_SIZE + 0.5),
            "antialias": self.antialias,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], input_size: int) -> "str | Mode":
        """Return the mode that a description means; its name if it is one of `MODES`.

        Args:
            values: `mode`, a name; or `mean` and `std` on the 0-1 scale, as torchvision and timm give them, and
                `channels`, by default RGB. Also `resize`, pixels for a crop of `input_size`, and `antialias`.

        Raises:
            ValueError: a value is missing or invalid.
        """
        name = values.get("mode")
        if name is None:
            mode = cls(_channels(values), _scaled(values, "mean"), _scaled(values, "std"), antialias=True)
        elif isinstance(name, str) and name in MODES:
            mode = MODES[name]
            if foreign := [key for key in ("channels", "mean", "std") if key in values]:
                raise ValueError(f"{' and '.join(foreign)} cannot stand beside the mode {name!r}")
        else:
            raise ValueError(f"there is no mode {name!r}; there is {', '.join(MODES)}")
        if "resize" in values:
            mode = replace(mode, resize=_shorter_side(values["resize"], input_size) * REFERENCE_SIZE / input_size)
        if "antialias" in values:
            if not isinstance(values["antialias"], bool):
                raise ValueError(f"antialias must be True or False, not {values['antialias']!r}")
            mode = replace(mode, antialias=values["antialias"])
        return next((name for name, known in MODES.items() if known == mode), mode)


MODE_KEYS = ("mode", "channels", "mean", "std", "resize", "antialias")
"""Keys that `Mode.from_dict` reads."""

_WHITE = 255.0


def _channels(values: Mapping[str, Any]) -> Literal["BGR", "RGB"]:
    channels: Literal["BGR", "RGB"] = values.get("channels", "RGB")
    if channels not in ("BGR", "RGB"):
        raise ValueError(f"channels must be RGB or BGR, not {channels!r}")
    return channels


def _scaled(values: Mapping[str, Any], key: str) -> tuple[float, float, float] | None:
    """Return three numbers on the 0-255 scale, as exact as they were written; None where they change nothing."""
    if key not in values:
        raise ValueError(f"it has neither a mode nor {key!r}")
    numbers = values[key]
    lowest = 0.0 if key == "mean" else 1e-6
    if not (
        isinstance(numbers, (list, tuple))
        and len(numbers) == 3
        and all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
        and all(lowest <= number <= 1 for number in numbers)
    ):
        rule = "from 0 to 1" if key == "mean" else "above 0 and at most 1"
        raise ValueError(f"{key} must be three numbers {rule}, for images whose white is 1, not {numbers!r}")
    red, green, blue = (round(float(number) * _WHITE, 6) for number in numbers)
    neutral = 0.0 if key == "mean" else 1.0
    return None if red == green == blue == neutral else (red, green, blue)


def _shorter_side(resize: Any, input_size: int) -> int:
    if type(resize) is not int or not input_size <= resize <= 4 * input_size:
        raise ValueError(f"resize must be a whole number from {input_size} to {4 * input_size} pixels, not {resize!r}")
    return resize


IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Means of ImageNet's training images: red, green, blue on the 0-255 scale."""
_IMAGENET_STD = (58.395, 57.12, 57.375)

MODES: dict[str, Mode] = {
    "bgr255": Mode("BGR"),
    "bgr255_mean": Mode("BGR", mean=IMAGENET_MEAN[::-1], takes_mean_image=True),
    "rgb_256": Mode("RGB", IMAGENET_MEAN, _IMAGENET_STD, antialias=True),
    "rgb_232": Mode("RGB", IMAGENET_MEAN, _IMAGENET_STD, resize=232, antialias=True),
}
