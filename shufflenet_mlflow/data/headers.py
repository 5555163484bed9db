"""Find unreadable image files before training, by their headers."""

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from shufflenet_mlflow.data.decode import has_sound_header, open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImage
from shufflenet_mlflow.data.reading import Reading

MOST_SECONDS = 10.0
"""Seconds for all files; those that are not reached by then are not looked at."""

_THREADS = 8
_AT_ONCE = 256


def bad_headers(
    listings: Sequence[ImageListing], reading: Reading, *, most_seconds: float = MOST_SECONDS
) -> list[BadImage]:
    """Return the files whose headers cannot be read, as far as time allows.

    A file that is damaged further on is found when it is decoded.
    """
    paths = [str(listing.root / os.fsdecode(path)) for listing in listings for path, _ in listing.samples.encoded()]
    until, bad = time.monotonic() + most_seconds, []
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")
        for begin in range(0, len(paths), _AT_ONCE):
            chunk = paths[begin : begin + _AT_ONCE]
            suspects = [
                path for path, is_sound in zip(chunk, pool.map(has_sound_header, chunk), strict=True) if not is_sound
            ]
            bad += [entry for path in suspects if (entry := _verdict(path, reading)) is not None]
            if time.monotonic() > until:
                break
    return bad


def _verdict(path: str, reading: Reading) -> BadImage | None:
    """Return what decoding says of the file; None if it can be decoded after all."""
    try:
        open_picture(path, reading).thumbnail(1)
    except UnreadableImageError as error:
        return BadImage(path, str(error))
    return None
