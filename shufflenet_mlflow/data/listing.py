"""What lies in an image folder, and what is hashed of it."""

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
"""MLflow takes data set digests of 36 characters at most."""

CONTENT_UP_TO = 1 << 30
"""Bytes of a set of images whose content is hashed; of larger ones paths and sizes have to do."""


@dataclass(frozen=True)
class Sample:
    """One image file."""

    path: str
    """Relative to the root, with forward slashes."""
    label: int
    bytes: int


class Samples(Sequence[Sample]):
    """Many samples in four arrays: a million take 70 MB, which the processes that decode images share.

    As a million objects they would take five times as much, in each process: counting references writes to them.

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
        """From paths, labels and sizes."""
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
        number = range(len(self))[index]  # IndexError beyond the end, which ends an iteration
        begin = self.ends[number - 1] if number else 0
        path = self.text[begin : self.ends[number]].tobytes().decode("utf-8", "surrogateescape")
        return Sample(path, int(self.labels[number]), int(self.sizes[number]))

    def encoded(self) -> Iterator[tuple[bytes, int]]:
        """Each path in UTF-8, and the file's size."""
        text, begin = self.text.tobytes(), 0
        for end, size in zip(self.ends.tolist(), self.sizes.tolist(), strict=True):
            yield text[begin:end], size
            begin = end


@dataclass(frozen=True)
class ImageListing:
    """What lies in an image folder, in an order that does not depend on the file system."""

    root: Path
    classes: tuple[str, ...]
    """Folder names in text order; a class's label is its place here."""
    samples: Samples
    """By class, then by path."""
    foreign: tuple[str, ...] = ()
    """Files without an image's suffix, relative to the root; they were left out."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> label."""
        return {name: label for label, name in enumerate(self.classes)}

    @cached_property
    def digest(self) -> str:
        """Hash of every path and size: equal for a copy elsewhere, different once a file comes or goes."""
        hashed = hashlib.sha256()
        for path, size in self.samples.encoded():
            hashed.update(_entry(path, size))
        return hashed.hexdigest()[:DIGEST_LENGTH]

    @property
    def is_small(self) -> bool:
        """Whether reading all of it takes seconds at most."""
        return int(self.samples.sizes.sum()) <= CONTENT_UP_TO

    @cached_property
    def content_digest(self) -> str:
        """Hash of every path and of every file's bytes; `digest` where there is more than `CONTENT_UP_TO` to read."""
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
    """Add a file's bytes; of one that cannot be read, that it cannot."""
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError:
        hashed.update(b"\0unreadable")
