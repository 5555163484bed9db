"""The folders, or the table, of a data set that is checked, listed without refusing anything."""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from shufflenet_mlflow.data.folder import files_below, is_image_name
from shufflenet_mlflow.data.table import is_table, list_table
from shufflenet_mlflow.errors import DataError

TRAIN_NAMES = ("train", "training")
SPLIT_NAMES = (*TRAIN_NAMES, "val", "valid", "validation", "test", "testing")
"""Names of folders that hold a part of a data set, not a class."""


@dataclass(frozen=True)
class ImageFile:
    """An image file of a data set."""

    part: str
    """Name of the part that it belongs to, such as `train`."""
    root: Path
    path: str
    """Relative to the root, with forward slashes."""
    label: str | None = None
    """Its class in a table; None for a folder of each class, whose name begins the path."""

    @property
    def class_name(self) -> str:
        """Name of its class, in the form of Unicode in which names are compared."""
        return unicodedata.normalize("NFC", self.path.partition("/")[0] if self.label is None else self.label)

    @property
    def file(self) -> str:
        """Path to open."""
        return os.path.join(self.root, self.path)

    @property
    def shown(self) -> str:
        """Path for people: with the name of its part, if the data set has several."""
        return f"{self.part}/{self.path}" if self.part else self.path


@dataclass(frozen=True)
class Part:
    """A folder with one folder per class, or the rows of a table with one entry in the column `split`."""

    name: str
    """Empty if the data set is not divided."""
    root: Path
    """The folder, or the table."""
    folders: tuple[str, ...]
    """Names of the class folders as the file system has them, with and without images; the labels of a table."""
    files: tuple[ImageFile, ...]
    others: tuple[str, ...]
    """Paths of files that are no images by their suffix, or in no class folder."""


def list_parts(directory: Path, *, option: str, prefix: str = "") -> list[Part]:
    """Return the parts of a data set: the folder itself, or the folders in it that are called train, val and the like.

    Args:
        directory: the folder, or a table of images.
        option: what to call it in messages.
        prefix: stands before the parts' names.

    Raises:
        DataError: it is not a folder or table that can be read, or holds no image.
    """
    if is_table(directory):
        return _parts_of_table(directory, option, prefix)
    if not os.path.isdir(directory):
        raise DataError(
            f"{option} {str(directory)!r} is not a folder; DIR is one with a folder per class, or with train and val "
            "that have those, or a table of images (.csv, .parquet)",
            code="check-no-folder",
        )
    names = _folders_in(directory, option)
    is_divided = any(name in TRAIN_NAMES for name in names) and all(name.lower() in SPLIT_NAMES for name in names)
    roots = {f"{prefix}{name}": directory / name for name in names} if is_divided else {prefix.rstrip("/"): directory}
    parts = [_list_part(name, root, option) for name, root in roots.items()]
    if not any(part.files for part in parts):
        raise DataError(
            f"{option} {str(directory)!r} holds no image in a folder of a class, such as cat/0001.jpg",
            code="check-no-images",
        )
    return sorted(parts, key=lambda part: part.root.name not in TRAIN_NAMES)


def _folders_in(directory: Path, option: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise DataError(
            f"{option} {str(directory)!r} cannot be read: {error.strerror}", code="check-folder-unreadable"
        ) from None


def _list_part(name: str, root: Path, option: str) -> Part:
    files, others = [], []
    for path in files_below(os.fspath(root)):
        if "/" in path and is_image_name(path):
            files.append(ImageFile(name, root, path))
        else:
            others.append(path)
    return Part(name, root, tuple(_folders_in(root, option)), tuple(files), tuple(others))


def _parts_of_table(path: Path, option: str, prefix: str) -> list[Part]:
    """Return one part for each entry of the column `split`, or one for a table without it."""
    listing = list_table(path, option=option, skip_missing=True)
    splits = listing.splits or ("",) * len(listing)
    files: dict[str, list[ImageFile]] = {name: [] for name in ("train", "val", "test", "") if name in splits}
    for sample, split in zip(listing.samples, splits, strict=True):
        part = f"{prefix}{split}" if split else prefix.rstrip("/")
        files[split].append(ImageFile(part, listing.root, sample.path, listing.classes[sample.label]))
    return [
        Part(found[0].part, path, tuple(sorted({str(file.label) for file in found})), tuple(found), ())
        for found in files.values()
    ]
