"""The listing of an image folder: its classes, samples and digests."""

import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from shufflenet_mlflow.data.digests import shortened

DIGEST_LENGTH = 32
"""Characters of a digest; MLflow takes at most 36."""

CLASS_DIGEST_LENGTH = 12
"""Characters of a class's digest, which only helps to say what has changed."""

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
        text: uint8, all paths one after the other, as the file system has them.
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
            text += os.fsencode(path)
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
        path = os.fsdecode(self.text[begin : self.ends[number]].tobytes())
        return Sample(path, int(self.labels[number]), int(self.sizes[number]))

    def encoded(self) -> Iterator[tuple[bytes, int]]:
        """Yield each path as the file system has it, and the file's size."""
        text, begin = self.text.tobytes(), 0
        for end, size in zip(self.ends.tolist(), self.sizes.tolist(), strict=True):
            yield text[begin:end], size
            begin = end


@dataclass(frozen=True)
class Table:
    """The file that lists the images, and its optional columns, with one entry per sample."""

    path: Path
    splits: tuple[str, ...] | None = None
    """`train`, `val` or `test`."""
    groups: tuple[str, ...] | None = None
    """Images of one group stay together; empty text is a group of its own."""


@dataclass(frozen=True)
class ImageListing:
    """The images of a folder or a table, in an order that does not depend on the file system."""

    root: Path
    """Folder that the paths are relative to."""
    classes: tuple[str, ...]
    """Folder names in text order, or those of a checkpoint in its order; a class's label is its index."""
    samples: Samples
    """Sorted by class, then by path."""
    foreign: tuple[str, ...] = ()
    """Paths of other files, without an image's suffix, relative to the root."""
    loose: tuple[str, ...] = ()
    """Files beside the class folders."""
    form: Literal["NFC", "NFD"] | None = None
    """The form of Unicode in which digests take the names; None for the folder's own."""
    table: Table | None = None
    """Where the images are listed; None for a folder, whose own folders are the classes."""
    merged: tuple[str, ...] = ()
    """Classes of several folders, whose names are the same text in different forms of Unicode."""
    has_class_folders: bool = True
    """Whether each path begins with the class's name; if not, digests include the labels."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def source(self) -> Path:
        """The table or the folder."""
        return self.root if self.table is None else self.table.path

    @property
    def splits(self) -> tuple[str, ...] | None:
        """A table's column of that name."""
        return None if self.table is None else self.table.splits

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> label."""
        return {name: label for label, name in enumerate(self.classes)}

    def only(self, is_kept_N: NDArray[np.bool_]) -> "ImageListing":
        """Return the listing of some of the images, with the same classes; of a table's columns, only the groups stay.

        Args:
            is_kept_N: bool (N), for each sample.
        """
        lengths_N = np.diff(self.samples.ends, prepend=0)
        samples = Samples(
            self.samples.text[np.repeat(is_kept_N, lengths_N)],
            np.cumsum(lengths_N[is_kept_N]),
            self.samples.labels[is_kept_N],
            self.samples.sizes[is_kept_N],
        )
        table = self.table
        if table is not None:
            groups = None if table.groups is None else tuple(itertools.compress(table.groups, is_kept_N.tolist()))
            table = Table(table.path, groups=groups)
        return replace(self, samples=samples, table=table)

    def without_columns(self) -> "ImageListing":
        """Return the same images without a table's columns, which nothing needs once the images are divided."""
        return self if self.table is None else replace(self, table=Table(self.table.path))

    def relabelled(self, new: Mapping[str, tuple[str, int]]) -> "ImageListing":
        """Return the same images with other names and labels of the classes.

        Args:
            new: class name -> new name and label.
        """
        labels = np.array([new[name][1] for name in self.classes], np.int32)
        samples = Samples(self.samples.text, self.samples.ends, labels[self.samples.labels], self.samples.sizes)
        classes = tuple(name for name, _ in sorted(new.values(), key=lambda entry: entry[1]))
        return replace(self, classes=classes, samples=samples)

    def without(self, suffixes: tuple[str, ...]) -> "ImageListing":
        """Return the listing that leaves out the images with one of these suffixes."""
        rows = [(sample.path, sample.label, sample.bytes) for sample in self.samples]
        left_out = [path for path, _, _ in rows if path.lower().endswith(suffixes)]
        kept = Samples.of(row for row in rows if not row[0].lower().endswith(suffixes))
        return replace(self, samples=kept, foreign=(*self.foreign, *left_out))

    def in_form(self, form: Literal["NFC", "NFD"]) -> "ImageListing":
        """Return the listing that a copy of the folder with its names in this form of Unicode has, opened here."""
        renamed = sorted((unicodedata.normalize(form, name), label) for label, name in enumerate(self.classes))
        label_of = {old: label for label, (_, old) in enumerate(renamed)}
        ordered = sorted(
            ((label_of[sample.label], unicodedata.normalize(form, sample.path), sample) for sample in self.samples),
            key=lambda entry: entry[:2],
        )
        samples = Samples.of((sample.path, label, sample.bytes) for label, _, sample in ordered)
        return replace(self, classes=tuple(name for name, _ in renamed), samples=samples, form=form)

    def in_form_of(self, digest: object) -> "ImageListing":
        """Return the listing with its names in the form of Unicode in which it has that digest, if it has in either."""
        if digest == self.digest or self.is_ascii:
            return self
        forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
        return next((found for form in forms if (found := self.in_form(form)).digest == digest), self)

    @cached_property
    def digest(self) -> str:
        """Hash of all paths and sizes: equal for a copy elsewhere, different once a file is added or removed."""
        hashed = hashlib.sha256()
        for _, _, entry in self._entries():
            hashed.update(entry)
        return hashed.hexdigest()[:DIGEST_LENGTH]

    def _entries(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield label and path of each image, and what digests take of it."""
        names = [b"" if self.has_class_folders else b"\0%b" % name.encode() for name in self.classes]
        for label, (path, size) in zip(self.samples.labels.tolist(), self.samples.encoded(), strict=True):
            yield label, path, b"%b\0%d%b\n" % (_in_form(path, self.form), size, names[label])

    @property
    def is_ascii(self) -> bool:
        """Whether all paths are in ASCII, where names have one form only."""
        return not len(self.samples.text) or int(self.samples.text.max()) < 0x80

    @property
    def is_small(self) -> bool:
        """Whether it has at most `CONTENT_UP_TO` bytes, which are read within seconds."""
        return int(self.samples.sizes.sum()) <= CONTENT_UP_TO

    @cached_property
    def content_digest(self) -> str:
        """Hash of all paths and contents; equal to `digest` unless `is_small`."""
        if not self.is_small:
            return self.digest
        return self._content_digests[0]

    @property
    def image_digests(self) -> list[bytes]:
        """Short digest of each image's content; empty unless `is_small`."""
        return self._content_digests[2] if self.is_small else []

    @property
    def class_digests(self) -> list[str]:
        """Hash of paths and contents, or of paths and sizes unless `is_small`, of each class."""
        return self._content_digests[1]

    @cached_property
    def _content_digests(self) -> tuple[str, list[str], list[bytes]]:
        of_image: list[bytes] = []
        whole, of_class = hashlib.sha256(), [hashlib.sha256() for _ in self.classes]
        with_content = self.is_small
        for label, path, entry in self._entries():
            both = (whole, of_class[label])
            for hashed in both:
                hashed.update(entry)
            if with_content:
                image = hashlib.sha256()
                _add_content((*both, image), self.root / os.fsdecode(path))
                of_image.append(shortened(image.digest()))
        class_digests = [hashed.hexdigest()[:CLASS_DIGEST_LENGTH] for hashed in of_class]
        return whole.hexdigest()[:DIGEST_LENGTH], class_digests, of_image


def _in_form(path: bytes, form: Literal["NFC", "NFD"] | None) -> bytes:
    if form is None:
        return path
    return unicodedata.normalize(form, path.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _add_content(hashes: "Sequence[hashlib._Hash]", path: Path) -> None:
    """Hash a file's bytes, or a mark if it cannot be read."""
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                for hashed in hashes:
                    hashed.update(block)
    except OSError:
        for hashed in hashes:
            hashed.update(b"\0unreadable")
