"""Decoding of image files to RGB pixels, resizing and centre crop.

Training, evaluation and prediction decode with this module, and logged models carry a copy of it (`export.bundle`), so
all of them see the same pixels. It imports nothing of the package, which a logged model may outlive.
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
"""The most pixels of a resized image: a file of a few bytes can be 1 pixel high and 60,000 wide."""

LARGEST_JPEG = 1 << 28
"""The most bytes of a file to read into memory; Pillow reads a larger one piece by piece."""


class UnreadableImageError(ValueError):
    """The file is not an image, is damaged, or is too large to use."""


Pixels = NDArray[np.uint8]
"""(height, width, 3) RGB."""


def decode(source: str | BinaryIO) -> Pixels:
    """Decode an image of any format that Pillow reads; of 16 bits per pixel the upper eight are kept.

    Intact JPEG files are decoded by simplejpeg, which yields the same pixels faster.

    Returns:
        uint8 (height, width, 3), RGB.

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
        # Without the path or object that Pillow repeats in "cannot identify image file '...'".
        reason = getattr(error, "strerror", None) or str(error).split(" '")[0].split(" <")[0]
        raise UnreadableImageError(reason or type(error).__name__) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce a grey image of 16 bits per pixel to eight, as Pillow does with coloured ones; return others unchanged.

    Pillow's own conversion clips values above 255, which is nearly all of them.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


_JPEG = b"\xff\xd8"


def _decode_jpeg(encoded: bytes) -> Pixels | None:
    """Decode a JPEG, or return None if Pillow has to: it has flaws, another colour space or an enormous size."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in ("YCbCr", "RGB", "Gray") or int(height) * int(width) > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels_HWC: Pixels = simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:
        return None
    return pixels_HWC


def resize_antialiased(pixels_HWC: Pixels, size: list[int]) -> Pixels:
    """Resize bilinearly with antialiasing, as Pillow does up to rounding.

    Args:
        size: [height, width], or [length of the shorter side].
    """
    from torchvision.transforms.v2 import functional  # takes a second to import, and few networks need it

    # With contiguous pixels PyTorch is fast, and keeps the channels of a pixel together.
    image_CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)
    return functional.resize(image_CHW, size, antialias=True).permute(1, 2, 0).numpy()


def resize_shorter_side(pixels_HWC: Pixels, size: int, *, antialias: bool) -> Pixels:
    """Resize bilinearly, with half-pixel centres, so that the shorter side is `size`.

    Without `antialias` as the original ShuffleNet release does, with it as torchvision does; the two also round the
    longer side differently.

    Raises:
        UnreadableImageError: the result would have more than `LARGEST_RESIZED` pixels.
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
    """Convert (height, width, 3) RGB to uint8 (3, height, width) in the order of `channels`, BGR or RGB.

    Its memory format is channels-last, which convolutions prefer on the CPU and on tensor cores.
    """
    is_bgr = channels == "BGR"
    ordered_HWC = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2BGR) if is_bgr else np.ascontiguousarray(pixels_HWC)
    return torch.from_numpy(ordered_HWC).permute(2, 0, 1)


@dataclass(frozen=True)
class CentreCrop:
    """RGB pixels -> uint8 (3, crop, crop): resize the shorter side, crop the centre."""

    crop: int
    """Height and width of the result."""
    resize: int
    """Length of the shorter side before the crop."""
    channels: str
    """BGR or RGB."""
    antialias: bool
    """Whether resizing antialiases."""

    def __call__(self, pixels_HWC: Pixels) -> Tensor:
        pixels_HWC = resize_shorter_side(pixels_HWC, self.resize, antialias=self.antialias)
        top = round((pixels_HWC.shape[0] - self.crop) / 2)
        left = round((pixels_HWC.shape[1] - self.crop) / 2)
        return to_tensor(pixels_HWC[top : top + self.crop, left : left + self.crop], self.channels)
