"""One look at each image file: its digest, its size, and a fingerprint that survives resizing and compression."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shufflenet_mlflow.data.checking.folders import ImageFile
from shufflenet_mlflow.data.decode import decode
from shufflenet_mlflow.data.formats import LARGEST_FILE, UnreadableImageError, open_image
from shufflenet_mlflow.data.resize import Pixels
from shufflenet_mlflow.runtime.devices import usable_cores
from shufflenet_mlflow.runtime.progress import Phase
from shufflenet_mlflow.runtime.signals import StopFlag

HASH_SIDE = 8
"""Side of the perceptual hash, which has its square of bits."""

COLOURS_SIDE = 8
"""Side of the small image that is kept of each, beside the hash."""

_REDUCED = 32
_AT_ONCE = 256


@dataclass(frozen=True)
class Look:
    """Properties of an image file."""

    image: ImageFile
    digest: bytes | None
    """SHA-256 of the file; None if it could not be read."""
    problem: str | None = None
    """Why it cannot be decoded; None if it can."""
    width: int = 0
    height: int = 0
    channels: str = ""
    """Pillow's mode of the file: L is grey, RGB, RGBA, CMYK and so on."""
    contrast: float = 0.0
    """Standard deviation of brightness over a reduced image, 0..128."""
    bits: NDArray[np.bool_] | None = None
    """bool (64): the perceptual hash; None if it cannot be decoded."""
    colours: NDArray[np.uint8] | None = None
    """uint8 (192): 8 x 8 pixels in RGB."""


def look_at_all(images: Sequence[ImageFile], phase: Phase, stop: StopFlag) -> Iterator[Look]:
    """Yield a look at each image, in order, on all cores.

    Raises:
        StopRequested: a signal arrived.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cores()) as pool:
        warnings.simplefilter("ignore")  # of odd metadata; decoding says what matters
        for begin in range(0, len(images), _AT_ONCE):
            for look in pool.map(look_at, images[begin : begin + _AT_ONCE]):
                phase.advance()
                yield look
            stop.check()


def look_at(image: ImageFile) -> Look:
    """Read an image file once, and decode it with the eyes of training."""
    try:
        if os.path.getsize(image.file) > LARGEST_FILE:
            return Look(image, None, f"more than the {LARGEST_FILE} bytes that are read")
        with open(image.file, "rb") as file:
            encoded = file.read()
    except OSError as error:
        return Look(image, None, error.strerror or str(error))
    digest = hashlib.sha256(encoded).digest()
    try:
        pixels_HWC = decode(BytesIO(encoded))
        with open_image(BytesIO(encoded)) as opened:
            channels = opened.mode
    except UnreadableImageError as error:
        return Look(image, digest, str(error))
    height, width = pixels_HWC.shape[:2]
    grey_HW = cv2.cvtColor(_reduced(pixels_HWC, _REDUCED), cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)
    return Look(
        image,
        digest,
        None,
        width,
        height,
        channels,
        float(grey_HW.std()),
        _hash(grey_HW),
        _reduced(pixels_HWC, COLOURS_SIDE).reshape(-1),
    )


def _hash(grey_HW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which of the low frequencies are above their median (Zauner, 2010)."""
    import imagehash  # takes 0.3 s, and only this command needs it

    bits: NDArray[np.bool_] = imagehash.phash(Image.fromarray(grey_HW), HASH_SIDE).hash
    return bits.reshape(-1)


def _reduced(pixels_HWC: Pixels, side: int) -> Pixels:
    """Resize to a square, whatever the shape."""
    is_larger = min(pixels_HWC.shape[:2]) > side
    return cv2.resize(pixels_HWC, (side, side), interpolation=cv2.INTER_AREA if is_larger else cv2.INTER_LINEAR).astype(
        np.uint8, copy=False
    )
