"""Decode an image file to RGB pixels, resize it and crop its centre.

Training, evaluation and prediction decode with this module, and logged models carry a copy of it (`export.bundle`), so
all of them see the same pixels. A logged model outlives the package that made it: nothing of the package is imported.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

LARGEST_RESIZED = 1 << 26
"""Pixels of a resized image: a file of a few bytes can be 1 pixel high and 60,000 wide."""

LARGEST_JPEG = 1 << 28
"""Bytes of a file that are read into memory; a larger one is left to Pillow, which reads a file piece by piece."""


class UnreadableImageError(ValueError):
    """What should be an image is none, or none that can be used."""


Pixels = NDArray[np.uint8]
"""(height, width, 3) RGB."""


def decode(source: str | BinaryIO) -> Pixels:
    """Read an image of any kind that Pillow knows as RGB; of 16 bits per pixel the upper eight count.

    JPEG files without flaws are left to simplejpeg, which gives the same pixels in less time.

    Raises:
        UnreadableImageError: it cannot be opened or decoded.
    """
    try:
        with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
            if file.read(len(_JPEG)) == _JPEG:
                pixels_HWC = _decode_jpeg(_JPEG + file.read(LARGEST_JPEG))
                if pixels_HWC is not None:
                    return pixels_HWC
            file.seek(0)
            with Image.open(file) as image:
                return np.array(_eight_bits(image).convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise all kinds
        # Pillow repeats the path, or the object, in "cannot identify image file '...'".
        text = getattr(error, "strerror", None) or str(error).split(" '")[0].split(" <")[0]
        raise UnreadableImageError(text or type(error).__name__) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits per pixel in eight, as Pillow opens coloured ones; any other as it is.

    Pillow's own conversion cuts off what is above 255, which is nearly everything.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


_JPEG = b"\xff\xd8"


def _decode_jpeg(encoded: bytes) -> Pixels | None:
    """None where Pillow has to decide: on flaws that can be passed over, on other colours, on an enormous size."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in ("YCbCr", "RGB", "Gray") or int(height) * int(width) > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels_HWC: Pixels = simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:
        return None
    return pixels_HWC


def resize_antialiased(pixels_HWC: Pixels, size: list[int]) -> Pixels:
    """Bilinearly, averaging over the pixels that are left out, as Pillow does but for rounding.

    Args:
        size: height and width, or the length of the shorter side.
    """
    from torchvision.transforms.v2 import functional  # a second to import, and not needed for most networks

    # PyTorch is fast, and keeps the channels together, where the pixels lie one behind the other.
    image_CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)
    return functional.resize(image_CHW, size, antialias=True).permute(1, 2, 0).numpy()


def resize_shorter_side(pixels_HWC: Pixels, size: int, *, antialias: bool) -> Pixels:
    """Scale so that the shorter side is `size`, bilinearly, half-pixel centres.

    Without `antialias` as the original ShuffleNet release does, with it as torchvision does; the two also round the
    longer side differently.

    Raises:
        UnreadableImageError: the longer side would become enormous.
    """
    height, width = pixels_HWC.shape[:2]
    if (size / min(width, height)) ** 2 * width * height > LARGEST_RESIZED:
        raise UnreadableImageError(f"{width}x{height} pixels are too long and thin to be resized")
    if antialias:
        return resize_antialiased(pixels_HWC, [size])
    shorter = min(height, width)
    target = (int(size / shorter * width + 0.5), int(size / shorter * height + 0.5))
    if target == (width, height):
        return pixels_HWC
    return cv2.resize(pixels_HWC, target, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def to_tensor(pixels_HWC: Pixels, channels: str) -> Tensor:
    """(height, width, 3) RGB -> uint8 (3, height, width) in the order of `channels`, BGR or RGB.

    In memory the channels of a pixel stay together, as convolutions like them on the CPU and on tensor cores.
    """
    is_bgr = channels == "BGR"
    ordered_HWC = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2BGR) if is_bgr else np.ascontiguousarray(pixels_HWC)
    return torch.from_numpy(ordered_HWC).permute(2, 0, 1)


@dataclass(frozen=True)
class CentreCrop:
    """RGB pixels -> uint8 (3, crop, crop): the shorter side resized, the centre cropped."""

    crop: int
    resize: int
    """Pixels of the shorter side before the crop."""
    channels: str
    """BGR or RGB."""
    antialias: bool
    """Average over the pixels that are left out when an image is made smaller."""

    def __call__(self, pixels_HWC: Pixels) -> Tensor:
        pixels_HWC = resize_shorter_side(pixels_HWC, self.resize, antialias=self.antialias)
        top = round((pixels_HWC.shape[0] - self.crop) / 2)
        left = round((pixels_HWC.shape[1] - self.crop) / 2)
        return to_tensor(pixels_HWC[top : top + self.crop, left : left + self.crop], self.channels)
