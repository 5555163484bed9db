"""Write image folders for benchmarks: JPEG files with the statistics of photographs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SLOPE = 1.0
"""Amplitudes fall with 1 / frequency, as in natural images (Field, 1987)."""
CONTRAST = 55.0
"""Standard deviation of the pixels."""
BLUR = 5
"""Pixels that a phone's smallest detail is wide; files of 12 megapixels then have about 3 MB, as phones write them."""


def photograph(generator: np.random.Generator, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return one picture: greyish clouds of all sizes with a little colour, like most photographs."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequencies[0, 0] = np.inf
    layers = []
    for _ in range(4):
        spectrum = generator.normal(size=(*frequencies.shape, 2)) @ np.array([1, 1j]) / frequencies**SLOPE
        layer = np.fft.irfft2(spectrum, (height, width))
        layers.append(layer / layer.std())
    grey, *colours = layers
    pixels = np.stack([128 + CONTRAST * (0.9 * grey + 0.35 * colour) for colour in colours], -1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def phone_photograph(
    generator: np.random.Generator, width: int = 4032, height: int = 3024, *, blur: float = BLUR
) -> Image.Image:
    """Return a picture of 12 megapixels: a phone's lens and noise reduction leave less detail than there are pixels."""
    small = photograph(generator, round(width / blur), round(height / blur))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_photographs(
    root: Path,
    classes: int,
    per_class: int,
    seed: int = 0,
    make: Callable[[np.random.Generator], Image.Image] = photograph,
) -> int:
    """Write an image folder.

    Returns:
        The mean size of a file in bytes.
    """
    generator = np.random.default_rng(seed)
    sizes = []
    for label in range(classes):
        folder = root / f"{label:04}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            path = folder / f"{number:05}.jpg"
            make(generator).save(path, quality=QUALITY)
            sizes.append(path.stat().st_size)
    return round(sum(sizes) / len(sizes))
