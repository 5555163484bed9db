"""Images that show which numbers occur inside a network."""

import numpy as np
import torch
from torch import Tensor

from shufflenet_mlflow.data.decode import open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.progress import Reporter

CALIBRATION_IMAGES = 300
"""Images to quantise with, if the user does not say how many."""


def calibration_pixels(listing: ImageListing, preprocess: Preprocess, number: int, reporter: Reporter) -> Tensor:
    """Return images, evenly spaced over the listing: uint8 (N, 3, S, S), resized and cropped as in evaluation.

    Args:
        number: the most images to take; unreadable ones are left out.

    Raises:
        DataError: none can be read.
    """
    transform = eval_transform(preprocess)
    chosen = np.unique(np.linspace(0, len(listing) - 1, min(number, len(listing))).round().astype(int))
    pixels = []
    with reporter.phase("reading images", len(chosen)) as phase:
        for index in chosen.tolist():
            path = listing.root / listing.samples[index].path
            try:
                pixels.append(transform(open_picture(str(path), transform.reading)))
            except UnreadableImageError as error:
                reporter.warn(f"skipped: {str(path)!r} ({error})")
            phase.advance()
    if not pixels:
        raise DataError(
            f"no image in {str(listing.source)!r} can be read to calibrate with; --calibration-dir names others",
            code="calibration-no-image",
        )
    return torch.stack(pixels)
