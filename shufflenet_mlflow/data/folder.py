"""Image folders: one subfolder per class, images at any depth below it."""

import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from shufflenet_mlflow.data.listing import ImageListing, Samples
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.launchers import is_below_mlflow_run
from shufflenet_mlflow.runtime.text import counted, name_some

logger = logging.getLogger(__name__)

NEW_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe")
"""Suffixes that version 0.1 did not take for images."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", *NEW_SUFFIXES)
"""torchvision's `IMG_EXTENSIONS`, and `NEW_SUFFIXES`."""

IGNORED_NAMES = {"thumbs.db", "desktop.ini"}
"""Files that file managers leave behind; names that begin with a dot are ignored as well."""


def by_suffix(files: Sequence[str]) -> str:
    """Return how many files there are of each suffix, the most frequent first, such as "3 files (2 .mp4, 1 .txt)"."""
    suffixes = Counter(os.path.splitext(file)[1].lower() or "without a suffix" for file in files)
    return (
        f"{counted(len(files), 'file')} ({', '.join(f'{count} {suffix}' for suffix, count in suffixes.most_common())})"
    )


def is_image_name(path: str) -> bool:
    """Whether a file found in a folder is taken for an image, by its suffix."""
    return path.lower().endswith(IMAGE_SUFFIXES)


class _File(NamedTuple):
    """An entry of a folder that is not a folder itself."""

    path: str
    """Relative to the folder that was searched, with forward slashes."""
    bytes: int | None
    """0 for a broken link, which decoding will report; None for something other than a file, such as a pipe."""

    @property
    def is_image(self) -> bool:
        """Whether it is a file with an image's suffix."""
        return self.bytes is not None and is_image_name(self.path)


def _files_below(root: str, folder: str) -> list[_File]:
    """Return the files below `root`/`folder`, sorted; hidden files and folders are ignored.

    Raises:
        DataError: a folder cannot be read.
    """
    files: list[_File] = []
    pending = [folder]
    visited: set[tuple[int, int]] = set()
    if folder:
        status = os.stat(root)
        visited.add((status.st_dev, status.st_ino))
    while pending:
        parent = pending.pop()
        path = os.path.join(root, parent)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:  # a link that leads back up
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    below = f"{parent}/{entry.name}" if parent else entry.name
                    if _is_folder(entry):
                        pending.append(below)
                    elif entry.name.lower() not in IGNORED_NAMES:
                        files.append(_File(below, _size_of(entry)))
        except OSError as error:
            raise DataError(
                f"the folder {path!r} cannot be read: {error.strerror}", code="image-subfolder-unreadable"
            ) from None
    files.sort()
    return files


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder; False for a broken or circular link, which decoding will report."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size_of(entry: "os.DirEntry[str]") -> int | None:
    try:
        status = entry.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def image_files(folder: str) -> list[str]:
    """Return the paths of the image files below `folder`, sorted.

    Raises:
        DataError: a folder cannot be read.
    """
    return [os.path.join(folder, file) for file in files_below(folder) if is_image_name(file)]


def files_below(folder: str) -> list[str]:
    """Return the paths of the files below `folder`, relative to it, with forward slashes, sorted; without hidden ones.

    Raises:
        DataError: a folder cannot be read.
    """
    return [file.path for file in _files_below(folder, "") if file.bytes is not None]


def list_images(root: str | Path, *, option: str = "folder") -> ImageListing:
    """List the image folder `root`.

    Args:
        option: what to call the folder in messages, such as `--train-dir`.

    Raises:
        DataError: the folder is missing, unreadable or without class folders, a link in it is broken, or a class has
            no image.
    """
    root = Path(root)
    folders, loose = _class_folders(root, option)
    samples: list[tuple[str, int, int]] = []
    foreign: list[str] = []
    without_images: list[str] = []
    by_class = _by_class(folders)
    for label, names in enumerate(by_class.values()):
        before = len(samples)
        for file in chain.from_iterable(_files_below(os.fspath(root), name) for name in names):
            if file.is_image and file.bytes is not None:
                samples.append((file.path, label, file.bytes))
            else:
                foreign.append(file.path)
        if len(samples) == before:
            without_images.append(names[0])
    if without_images:
        raise DataError(
            f"{option} {str(root)!r}: no image in class {name_some(without_images, shown_as=repr)}; "
            "add images or remove the folder",
            code="class-without-images",
        )
    merged = tuple(name for name, names in by_class.items() if len(names) > 1)
    listing = ImageListing(root, tuple(by_class), Samples.of(samples), tuple(foreign), loose, merged=merged)
    logger.debug("%s: %d images of %d classes", root, len(listing), len(by_class))
    return listing


def _class_name(folder: str) -> str:
    """Return a folder's name as text, whatever the locale says that its bytes mean."""
    return os.fsencode(folder).decode("utf-8", "surrogateescape")


def _by_class(folders: Iterable[str]) -> dict[str, list[str]]:
    """Return the folders of each class: one, or those whose names are the same text in different forms of Unicode."""
    by_text: dict[str, list[str]] = {}
    for folder in folders:
        by_text.setdefault(_normal(_class_name(folder)), []).append(folder)
    named = [(_class_name(names[0]) if len(names) == 1 else text, names) for text, names in by_text.items()]
    return dict(sorted(named, key=lambda entry: entry[0].encode("utf-8", "surrogateescape")))


def _normal(name: str) -> str:
    """Return a name in the one form of Unicode in which names are compared.

    macOS and some tools write an umlaut as a letter and a dots' mark, others as one letter.
    """
    return unicodedata.normalize("NFC", name)


def _class_folders(root: Path, option: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the folders in `root`, in text order, and of the files beside them.

    Raises:
        DataError: there is none, `root` is not a readable folder, or a link in it is broken: a class would silently be
            missing.
    """
    try:
        with os.scandir(root) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        raise DataError(
            f"{option} {str(root)!r} does not exist; it needs one folder per class, such as cat/0001.jpg"
            + ("; mlflow run takes relative folders from the project's" if is_below_mlflow_run() else ""),
            code="image-folder-missing",
        ) from None
    except NotADirectoryError:
        raise DataError(
            f"{option} {str(root)!r} is a file, not a folder of classes or a table (.csv, .parquet)",
            code="image-folder-is-file",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{option} {str(root)[:200]!r} cannot be read: {reason}", code="image-folder-unreadable"
        ) from None
    if broken := sorted(entry.name for entry in shown if entry.is_symlink() and not os.path.exists(entry.path)):
        raise DataError(
            f"{option} {str(root)!r}: the link {name_some(broken, shown_as=repr)} is broken; "
            "restore its target or remove the link",
            code="class-link-broken",
        )
    names = sorted((entry.name for entry in shown if _is_folder(entry)), key=os.fsencode)
    loose = sorted(entry.name for entry in shown if entry.name.lower() not in IGNORED_NAMES and not _is_folder(entry))
    if not names:
        raise DataError(
            f"{option} {str(root)!r} has no class folders; it needs one folder per class, such as cat/0001.jpg",
            code="no-class-folders",
        )
    return tuple(names), tuple(loose)


def require_images_only(listing: ImageListing, *, option: str) -> None:
    """Raise DataError, which names them, if a folder holds files that are not images."""
    if listing.foreign:
        raise DataError(
            f"{option} {str(listing.root)!r} holds files that are not images: "
            f"{name_some(listing.foreign, shown_as=repr)}; remove them or pass --on-bad-image skip",
            code="files-not-images",
        )


def same_classes(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether two sets of classes have the same names and labels, in whatever form of Unicode."""
    return {_normal(name): label for name, label in one.items()} == {
        _normal(name): label for name, label in other.items()
    }


def same_names(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether names are the same, in whatever form of Unicode."""
    return {*map(_normal, one)} == {*map(_normal, other)}


def with_same_classes(
    expected: Mapping[str, int], listing: ImageListing, *, expected_in: str, option: str, way_out: str = ""
) -> ImageListing:
    """Return a listing with the expected names and labels of its classes.

    They may be written in another form of Unicode, which changes their order, too.

    Args:
        expected: class name -> label.
        expected_in: where the expected classes come from, for the message.
        way_out: what to do about others, for the message.

    Raises:
        DataError: it does not have the expected classes; the differences are named.
    """
    found = listing.class_to_idx
    if dict(expected) == found:
        return listing
    wanted = {_normal(name): name for name in expected}
    present = {_normal(name): name for name in found}
    if wanted.keys() == present.keys() and wanted != present and sorted(expected.values()) == sorted(found.values()):
        return listing.relabelled({present[name]: (wanted[name], expected[wanted[name]]) for name in wanted})
    differences = []
    if missing := sorted(wanted.keys() - present.keys()):
        differences.append(f"it lacks {name_some(missing, shown_as=repr)}")
    if extra := sorted(present.keys() - wanted.keys()):
        differences.append(f"it also has {name_some(extra, shown_as=repr)}")
    raise DataError(
        f"{option} {str(listing.source)!r} does not have the classes of {expected_in}: "
        f"{'; '.join(differences) or 'their order differs'}{way_out and f'; {way_out}'}",
        code="classes-differ",
    )
