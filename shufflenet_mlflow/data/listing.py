"""The listing of an image folder: its classes, samples and digests."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

DIGEST_LENGTH = 32
"""Characters of a digest; MLflow takes at most 36."""

CONTENT_UP_TO = 1 << 30
"""The most bytes of a data set whose content is hashed; of a larger one only paths and sizes are."""


@dataclass(frozen=True)
class Sample:
    """One image file."""

    path: str
    """Relative to the root, with forward slashes."""
    label: int
    bytes: int
    """Size of the file."""


class Samples(Sequence[Sample]):
    """Samples in four arrays: a million take 70 MB, shared with the worker processes.

    A million objects would take five times as much, and in each process: counting references writes to them.

    Args:
        text: uint8, all paths one after the other, in UTF-8.
        ends: int64 (n,), where each path ends in `text`.
        labels: int32 (n,).
        sizes: int64 (n,), bytes of each file.
    """

    def __init__(
        self,
        text: NDArray[np.uint8],
        ends: NDArray[np.int64],
        labels: NDArray[np.int32],
        sizes: NDArray[np.int64],
    ) -> None:
        self.text, self.ends, self.labels, self.sizes = text, ends, labels, sizes

    @classmethod
    def of(cls, samples: Iterable[tuple[str, int, int]]) -> "Samples":
        """Build from tuples of path, label and size."""
        text = bytearray()
        ends: list[int] = []
        labels: list[int] = []
        sizes: list[int] = []
        for path, label, size in samples:
            text += path.encode("utf-8", "surrogateescape")
            ends.append(len(text))
            labels.append(label)
            sizes.append(size)
        return cls(
            np.frombuffer(bytes(text), np.uint8),
            np.array(ends, np.int64),
            np.array(labels, np.int32),
            np.array(sizes, np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError beyond the end, which ends an iteration
        begin = self.ends[number - 1] if number else 0
        path = self.text[begin : self.ends[number]].tobytes().decode("utf-8", "surrogateescape")
        return Sample(path, int(self.labels[number]), int(self.sizes[number]))

    def encoded(self) -> Iterator[tuple[bytes, int]]:
        """Yield each path in UTF-8, and the file's size."""
        text, begin = self.text.tobytes(), 0
        for end, size in zip(self.ends.tolist(), self.sizes.tolist(), strict=True):
            yield text[begin:end], size
            begin = end


@dataclass(frozen=True)
class ImageListing:
    """The content of an image folder, in an order that does not depend on the file system."""

    root: Path
    classes: tuple[str, ...]
    """Folder names in text order; a class's label is its index."""
    samples: Samples
    """Sorted by class, then by path."""
    foreign: tuple[str, ...] = ()
    """Paths of other files, without an image's suffix, relative to the root."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> label."""
        return {name: label for label, name in enumerate(self.classes)}

    @cached_property
    def digest(self) -> str:
        """Hash of all paths and sizes: equal for a copy elsewhere, different once a file is added or removed."""
        hashed = hashlib.sha256()
        for path, size in self.samples.encoded():
            hashed.update(_entry(path, size))
        return hashed.hexdigest()[:DIGEST_LENGTH]

    @property
    def is_small(self) -> bool:
        """Whether it has at most `CONTENT_UP_TO` bytes, which are read within seconds."""
        return int(self.samples.sizes.sum()) <= CONTENT_UP_TO

    @cached_property
    def content_digest(self) -> str:
        """Hash of all paths and contents; equal to `digest` unless `is_small`."""
        if not self.is_small:
            return self.digest
        hashed = hashlib.sha256()
        for path, size in self.samples.encoded():
            hashed.update(_entry(path, size))
            _add_content(hashed, self.root / os.fsdecode(path))
        return hashed.hexdigest()[:DIGEST_LENGTH]


def _entry(path: bytes, size: int) -> bytes:
    return b"%b\0%d\n" % (path, size)


def _add_content(hashed: "hashlib._Hash", path: Path) -> None:
    """Hash a file's bytes, or a mark if it cannot be read."""
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError:
        hashed.update(b"\0unreadable")
