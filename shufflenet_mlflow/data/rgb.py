"""From an image that Pillow has opened to RGB pixels: their range, and what is transparent.

Logged models carry a copy of this module (`export.bundle`).
"""

import warnings

import numpy as np
from PIL import Image

from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.data.resize import Pixels


def to_rgb(image: Image.Image, reading: Reading) -> Pixels:
    """Convert an image to RGB, strip by strip: at once, a large one would be in memory several times."""
    width, height = image.size
    if width * height <= _STRIP_PIXELS:
        pixels_HWC: Pixels = np.array(_eight_bits(image, image, reading))
    else:
        pixels_HWC = np.empty((height, width, 3), np.uint8)
        rows = max(1, _STRIP_PIXELS // width)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            pixels_HWC[top : top + rows] = np.asarray(_eight_bits(strip, image, reading))
    if image.mode.startswith("I") and int(pixels_HWC.max()) - int(pixels_HWC.min()) < _LEAST_RANGE:
        warnings.warn(NEARLY_BLANK, stacklevel=2)
    return pixels_HWC


_STRIP_PIXELS = 1 << 22
_LEAST_RANGE = 16
NEARLY_BLANK = (
    "its values use less than a sixteenth of the range of their type, so it is nearly blank; scale them to that range"
)
"""A remark about an image such as one of 12 bits in a file of 16, which does not say so."""


def _eight_bits(part: Image.Image, image: Image.Image, reading: Reading) -> Image.Image:
    """Convert a part of an image to RGB.

    Pillow's own conversion clips values above 255, which is nearly all of them in an image of 16 bits per pixel.

    Raises:
        UnreadableImageError: it holds numbers without a range.
    """
    if reading.range == "clipped":
        if part.mode.startswith("I;16") or (part.mode == "I" and image.format in ("PNG", "PPM")):
            part = Image.fromarray((np.asarray(part) >> 8).astype(np.uint8))
    elif part.mode == "F":
        raise UnreadableImageError(
            "its values are floating-point numbers, which have no range of their own; convert it to 8 or 16 bits"
        )
    elif part.mode.startswith("I") or _is_signed(image):
        part = _upper_byte(part, image)
    if reading.transparency == "white" and part.has_transparency_data:
        coloured = part.convert("RGBA")
        white = Image.new("RGB", part.size, "white")
        white.paste(coloured, mask=coloured.getchannel("A"))
        return white
    return part.convert("RGB")


def _upper_byte(part: Image.Image, image: Image.Image) -> Image.Image:
    """Return the upper eight bits of a part of a grey image, with the least number of its type as 0."""
    bits = image.tag_v2[_BITS][0] if image.format == "TIFF" else 16  # type: ignore[attr-defined]
    values = np.asarray(part).astype(np.int64)
    values = values + (1 << (bits - 1)) if _is_signed(image) else values & 0xFFFFFFFF  # Pillow's numbers have a sign
    upper = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if image.format == "PNG" and "transparency" in image.info:
        upper.putalpha(Image.fromarray((values != image.info["transparency"]) * np.uint8(255)))
    return upper


def _is_signed(image: Image.Image) -> bool:
    """Whether the numbers of an image have a sign, as they can in a grey TIFF."""
    return image.format == "TIFF" and image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == 2  # type: ignore[attr-defined]


_BITS, _SAMPLE_FORMAT = 258, 339
