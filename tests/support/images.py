"""Small image folders whose classes a network can learn to tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


def write_images(folder: Path, classes: tuple[str, ...] = CLASSES, per_class: int = 12, seed: int = 0) -> Path:
    """Write an image folder whose classes differ in their brightest channel, with noise and odd sizes."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            height, width = rng.integers(33, 49, 2)
            pixels = rng.integers(0, 150, (height, width, 3), dtype=np.uint8)
            pixels[:, :, 2 - label % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder
