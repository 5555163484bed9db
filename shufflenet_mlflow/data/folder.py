"""An image folder, listed: one subfolder per class, images at any depth below it."""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from shufflenet_mlflow.errors import DataError

IGNORED_NAMES = {"thumbs.db", "desktop.ini"}
"""Files that file managers leave behind; names that begin with a dot are passed over as well."""

DIGEST_LENGTH = 32
"""MLflow takes data set digests of 36 characters at most."""

CONTENT_UP_TO = 1 << 30
"""Bytes of a set of images whose content is hashed; of larger ones paths and sizes have to do."""

_NAMED = 3
"""How many offending files a message names before it counts the rest."""


@dataclass(frozen=True)
class Sample:
    """One image file."""

    path: str
    """Relative to the root, with forward slashes."""
    label: int
    bytes: int


@dataclass(frozen=True)
class ImageListing:
    """What lies in an image folder, in an order that does not depend on the file system."""

    root: Path
    classes: tuple[str, ...]
    """Folder names in text order; a class's label is its place here."""
    samples: tuple[Sample, ...]
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
        lines = hashlib.sha256()
        for sample in self.samples:
            lines.update(f"{sample.path}\0{sample.bytes}\n".encode("utf-8", "surrogateescape"))
        return lines.hexdigest()[:DIGEST_LENGTH]

    @property
    def is_small(self) -> bool:
        """Whether reading all of it takes seconds at most."""
        return sum(sample.bytes for sample in self.samples) <= CONTENT_UP_TO

    @cached_property
    def content_digest(self) -> str:
        """Hash of every path and of every file's bytes; `digest` where there is more than `CONTENT_UP_TO` to read."""
        if not self.is_small:
            return self.digest
        hashed = hashlib.sha256()
        for sample in self.samples:
            hashed.update(f"{sample.path}\0{sample.bytes}\n".encode("utf-8", "surrogateescape"))
            _add_content(hashed, self.root / sample.path)
        return hashed.hexdigest()[:DIGEST_LENGTH]


def _add_content(hashed: "hashlib._Hash", path: Path) -> None:
    """Add a file's bytes; of one that cannot be read, that it cannot."""
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError:
        hashed.update(b"\0unreadable")


def _subfolders(root: Path) -> list[os.DirEntry[str]]:
    with os.scandir(root) as entries:
        return sorted(
            (entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")),
            key=lambda entry: entry.name,
        )


def _raise(error: OSError) -> None:
    raise DataError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from None


def _files_below(folder: str) -> list[str]:
    """Paths of the files below `folder`, sorted; hidden files and folders are passed over."""
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and name.lower() not in IGNORED_NAMES
        ]
    return sorted(found)


def image_files(folder: str) -> list[str]:
    """Paths of the image files below `folder`, sorted.

    Raises:
        DataError: a folder cannot be read.
    """
    return [path for path in _files_below(folder) if path.lower().endswith(IMG_EXTENSIONS) and _size_of(path)]


def _size_of(path: str) -> int | None:
    """Bytes of a file; 0 for a broken link, which decoding will name; None for what is no file, such as a pipe."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def list_images(root: str | Path, *, option: str = "folder") -> ImageListing:
    """List the image folder `root`.

    Args:
        option: what to call the folder in messages, such as `--train-dir`.

    Raises:
        DataError: the folder is missing, empty, unreadable, holds images but no class folders, or a class
            has no image.
    """
    root = Path(root)
    try:
        class_entries = _subfolders(root)
    except FileNotFoundError:
        raise DataError(f"{option} {str(root)!r} does not exist") from None
    except NotADirectoryError:
        raise DataError(f"{option} {str(root)!r} is a file, not a folder of classes") from None
    except (OSError, ValueError) as error:  # ValueError: it holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{option} {str(root)[:200]!r} cannot be read: {reason}") from None
    if not class_entries:
        raise DataError(
            f"{option} {str(root)!r} has no class folders; it needs one folder per class, such as cat/0001.jpg"
        )

    samples: list[Sample] = []
    foreign: list[str] = []
    without_images: list[str] = []
    for label, entry in enumerate(class_entries):
        before = len(samples)
        for path in _files_below(entry.path):
            relative = Path(path).relative_to(root).as_posix()
            if path.lower().endswith(IMG_EXTENSIONS) and (size := _size_of(path)) is not None:
                samples.append(Sample(relative, label, size))
            else:
                foreign.append(relative)
        if len(samples) == before:
            without_images.append(entry.name)
    if without_images:
        raise DataError(
            f"{option} {str(root)!r}: no image in class {name_some(without_images)}; add images or remove the folder"
        )
    classes = tuple(entry.name for entry in class_entries)
    return ImageListing(root, classes, tuple(samples), tuple(foreign))


def name_some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def require_images_only(listing: ImageListing, *, option: str) -> None:
    """Refuse a folder that holds other files than images.

    Raises:
        DataError: it does; the message names them.
    """
    if listing.foreign:
        raise DataError(
            f"{option} {str(listing.root)!r} holds files that are not images: "
            f"{name_some(listing.foreign)}; remove them or pass --on-bad-image skip"
        )


def require_same_classes(expected: Mapping[str, int], listing: ImageListing, *, expected_in: str, option: str) -> None:
    """Refuse a folder whose classes are not the expected ones.

    Args:
        expected: class name -> label.
        expected_in: where the expected classes come from, for the message.

    Raises:
        DataError: the two differ; the message says in what.
    """
    found = listing.class_to_idx
    if dict(expected) == found:
        return
    differences = []
    if missing := sorted(set(expected) - set(found)):
        differences.append(f"it lacks {name_some(missing)}")
    if extra := sorted(set(found) - set(expected)):
        differences.append(f"it alone has {name_some(extra)}")
    raise DataError(
        f"{option} {str(listing.root)!r} does not have the classes of {expected_in}: "
        f"{'; '.join(differences) or 'the labels are in another order'}"
    )
