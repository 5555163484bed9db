"""Resizing of pixels, and their conversion to a tensor.

Logged models carry a copy of this module (`export.bundle`).
"""

import platform

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from shufflenet_mlflow.data.formats import UnreadableImageError

LARGEST_RESIZED = 1 << 26
"""The most pixels of a resized image: a file of a few bytes can be 1 pixel high and 60,000 wide."""

Pixels = NDArray[np.uint8]
"""(height, width, 3) RGB."""

_ARM = ("aarch64", "arm64")


def resize(pixels_HWC: Pixels, height: int, width: int, *, antialias: bool) -> Pixels:
    """Resize bilinearly with half-pixel centres: as Pillow does up to rounding, or without antialiasing as OpenCV."""
    if not antialias:
        if pixels_HWC.shape[:2] == (height, width):
            return pixels_HWC
        return cv2.resize(pixels_HWC, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    # As torchvision does, whose import takes seconds: on bytes where PyTorch has the instructions for it. The channels
    # of a pixel stay together.
    image_NCHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC))[None].permute(0, 3, 1, 2)
    on_bytes = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in _ARM
    resized_NCHW = interpolate(
        image_NCHW if on_bytes else image_NCHW.float(), [height, width], mode="bilinear", antialias=True
    )
    return (resized_NCHW if on_bytes else resized_NCHW.round().byte())[0].permute(1, 2, 0).numpy()


def resized_shape(height: int, width: int, shorter: int, *, antialias: bool) -> tuple[int, int]:
    """Return height and width of an image whose shorter side is resized to `shorter`.

    The longer side is rounded as the original ShuffleNet release does, or, for an antialiased image, as torchvision.

    Raises:
        UnreadableImageError: the result would have more than `LARGEST_RESIZED` pixels.
    """
    least = min(height, width)
    if least == 0:
        raise UnreadableImageError(f"{width}x{height} pixels: it is empty")
    if (shorter / least) ** 2 * width * height > LARGEST_RESIZED:
        raise UnreadableImageError(f"{width}x{height} pixels are too long and thin to be resized")
    if not antialias:
        return int(shorter / least * height + 0.5), int(shorter / least * width + 0.5)
    longer = int(shorter * max(height, width) / least)
    return (longer, shorter) if height > width else (shorter, longer)


def to_tensor(pixels_HWC: Pixels, channels: str) -> Tensor:
    """Convert (height, width, 3) RGB to uint8 (3, height, width) in the order of `channels`, BGR or RGB.

    Its memory format is channels-last, which convolutions prefer on the CPU and on tensor cores.
    """
    is_bgr = channels == "BGR"
    ordered_HWC = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2BGR) if is_bgr else np.ascontiguousarray(pixels_HWC)
    return torch.from_numpy(ordered_HWC).permute(2, 0, 1)
