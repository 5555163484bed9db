"""Warnings of Pillow about a file, such as damaged EXIF data: kept, instead of printed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def remarks() -> Iterator[list[str]]:
    """Yield a list of the warnings given within the block; it is filled at the end of it."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the default tells of each kind once, whatever the file
        yield found
    found += (" ".join(str(warning.message).split()) for warning in caught)
