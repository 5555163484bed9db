"""An image as docs/serving.md tells programs without this package to make its pixels: the same, byte for byte."""

from io import BytesIO

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from shufflenet_mlflow.data.decode import CentreCrop, open_picture
from shufflenet_mlflow.data.reading import Reading

RESIZE, CROP = 72, 64


def photograph(number: int) -> bytes:
    """Return a JPEG of some odd size, up to 30 times that of the crop."""
    generator = np.random.default_rng(number)
    height, width = (int(size) for size in generator.integers(65, (300, 2000)[number % 2], 2))
    coarse = generator.integers(0, 255, (9, 9, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def by_the_steps(jpeg: bytes, *, is_scaled: bool) -> tuple[Tensor, int]:
    """Return the pixels, uint8 (3, 64, 64), and by what the JPEG was shrunk while it was decoded."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    longer = int(RESIZE * max(height, width) / min(height, width))
    size = (longer, RESIZE) if height > width else (RESIZE, longer)
    factor = min(height / size[0], width / size[1])
    shrunk = next((by for by in (8, 4, 2) if is_scaled and factor >= 2 * by), 1)
    least = {"min_height": -(-height // shrunk), "min_width": -(-width // shrunk)} if shrunk > 1 else {}
    pixels_HWC = simplejpeg.decode_jpeg(jpeg, "RGB", **least)[: round(height / shrunk), : round(width / shrunk)]
    resized_CHW = functional.resize(torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1), list(size), antialias=True)
    top, left = round((size[0] - CROP) / 2), round((size[1] - CROP) / 2)
    return resized_CHW[:, top : top + CROP, left : left + CROP], shrunk


@pytest.mark.parametrize("decoding", ["scaled", "full"])
def test_the_steps_give_the_same_pixels(decoding: str) -> None:
    reading = Reading(decoding=decoding)
    ours = CentreCrop(resize=RESIZE, crop=CROP, antialias=True, channels="RGB", reading=reading)
    seen = set()
    for number in range(40):
        jpeg = photograph(number)
        theirs, shrunk = by_the_steps(jpeg, is_scaled=decoding == "scaled")
        assert torch.equal(ours(open_picture(BytesIO(jpeg), reading)), theirs), number
        seen.add(shrunk)
    assert seen == ({1, 2, 4, 8} if decoding == "scaled" else {1})
