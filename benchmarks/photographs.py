"""Write image folders for benchmarks: JPEG files of ImageNet's size with the statistics of photographs."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SLOPE = 1.0
"""Amplitudes fall with 1 / frequency, as in natural images (Field, 1987)."""
CONTRAST = 55.0
"""Standard deviation of the pixels."""


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


def write_photographs(root: Path, classes: int, per_class: int, seed: int = 0) -> int:
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
            photograph(generator).save(path, quality=QUALITY)
            sizes.append(path.stat().st_size)
    return round(sum(sizes) / len(sizes))
