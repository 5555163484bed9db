"""Random numbers of the release's augmentation: the same as torchvision's transforms draw, without importing them.

torchvision's import takes seconds, before the first image of every training. A test compares both.
"""

import math

import torch

from shufflenet_mlflow.data.decode import Box

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""A crop's share of the picture's area, and its width over its height, whose logarithm is drawn."""

TRIES = 10
"""Draws of a crop until one lies within the picture."""

STRENGTH = 0.4
"""Brightness, contrast and saturation are multiplied by 1 - 0.4 to 1 + 0.4."""

_CHANGES = ("brightness", "contrast", "saturation", "hue")
"""Changes of colour as torchvision orders them; the hue stays, but has its place in the order that is drawn."""


def draw_crop(height: int, width: int) -> Box:
    """Draw a crop as torchvision's `RandomResizedCrop`: a random share of the area, of random proportions.

    If no draw fits, it is the largest central crop of the nearest allowed proportions.
    """
    low, high = (float(torch.log(torch.tensor(ratio))) for ratio in RATIO)
    for _ in range(TRIES):
        area = height * width * _uniform(*AREA)
        ratio = float(torch.exp(torch.empty(1).uniform_(low, high)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(height - crop_height + 1, (1,)))
            left = int(torch.randint(width - crop_width + 1, (1,)))
            return Box(top, left, crop_height, crop_width)
    crop_height, crop_width = height, width
    if width / height < RATIO[0]:
        crop_height = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        crop_width = round(height * RATIO[1])
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def draw_colours() -> list[tuple[str, float]]:
    """Draw the changes of torchvision's `ColorJitter(0.4, 0.4, 0.4)`: their names in order, each with its factor."""
    order = torch.randperm(len(_CHANGES)).tolist()
    factors = {name: _uniform(1 - STRENGTH, 1 + STRENGTH) for name in _CHANGES[:3]}
    return [(_CHANGES[index], factors[_CHANGES[index]]) for index in order if _CHANGES[index] in factors]


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))
