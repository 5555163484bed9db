"""The images named on a command line: files, folders, patterns, and standard input."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from typing import BinaryIO

from shufflenet_mlflow.data.folder import files_below, image_files, is_image_name
from shufflenet_mlflow.data.listing import Samples
from shufflenet_mlflow.data.table import is_table, table_images
from shufflenet_mlflow.errors import ConfigError, DataError

STDIN = "-"
"""The name of standard input, and of an image that is read from it."""

_RECURSIVE = "**"
_BINARY = frozenset(range(0x20)) - set(b"\0\t\n\r")
"""Bytes that do not occur at the beginning of a list of paths; a NUL may separate its entries."""
_BEGINNING = 1024
"""Bytes that are searched for `_BINARY`."""


@dataclass(frozen=True)
class Pictures:
    """Images in the order in which they were named, each as often as it was named."""

    files: Samples
    """Their paths; labels and sizes are 0."""
    piped: bytes | None = None
    """The content of the image on standard input."""
    piped_index: int = -1
    """Index of that image in `files`."""
    left_out: tuple[str, ...] = ()
    """Files in the folders that are not images, by their suffix."""

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Return the path of one image; `STDIN` for the one on standard input."""
        return self.files[index].path

    def paths(self) -> Iterator[str]:
        """Yield the paths of all images, in order."""
        return (os.fsdecode(path) for path, _ in self.files.encoded())

    def source(self, index: int) -> str | BinaryIO:
        """Return what to decode: a path, or an open file."""
        return BytesIO(self.piped) if self.piped is not None and index == self.piped_index else self.path(index)


def find_pictures(words: Sequence[str], stdin: Callable[[], BinaryIO]) -> Pictures:
    """Find the images named on a command line.

    A word is, in this order: `-`, an existing file (of a table: the images that it lists), an existing folder (the
    images below it, sorted), or a pattern (the files that it matches, sorted; `**` matches any number of folders). A
    leading `~` is expanded unless a file has that very name. Hidden files are found only by name.

    Standard input holds one image, or paths of files and folders: separated by NUL if it contains one, otherwise one a
    line. It is a list if it begins with an existing path, or if it looks like text and Pillow does not open it.

    Args:
        stdin: opens standard input; called only if it is named.

    Raises:
        ConfigError: standard input is named twice.
        DataError: a path does not exist, or a folder or pattern yields no image.
    """
    if list(words).count(STDIN) > 1:
        raise ConfigError("standard input (-) can be named only once", code="stdin-twice")
    paths: list[str] = []
    piped, piped_index = None, -1
    for word in words:
        if word != STDIN:
            paths += _paths_of(word)
            continue
        content = stdin().read()
        entries = _entries(content)
        if entries is None:
            piped, piped_index = content, len(paths)
            paths.append(STDIN)
            continue
        for number, entry in entries:
            paths += _existing(entry, f" (entry {number} on standard input)")
    folders = dict.fromkeys(word for word in words if word != STDIN and os.path.isdir(os.path.expanduser(word)))
    left_out = [
        name for folder in folders for name in files_below(os.path.expanduser(folder)) if not is_image_name(name)
    ]
    return Pictures(Samples.of((path, 0, 0) for path in paths), piped, piped_index, tuple(left_out))


def _paths_of(word: str) -> list[str]:
    """Return the paths of the images that one word names.

    Raises:
        DataError: there are none.
    """
    if not os.path.exists(word):
        word = os.path.expanduser(word)
        if glob.has_magic(word) and not os.path.exists(word):
            matches = sorted(_matching(word))
            if not matches:
                raise DataError(f"no image matches the pattern {word!r}", code="pattern-without-match")
            return matches
    return _existing(word)


def _existing(path: str, where: str = "") -> list[str]:
    """Return the file, the images that it lists if it is a table, or the images below the folder.

    Args:
        where: what to add to messages.

    Raises:
        DataError: it does not exist, holds no image, or is a table that cannot be used.
    """
    if os.path.isdir(path):
        images = image_files(path)
        if not images:
            raise DataError(f"the folder {path!r} holds no images{where}", code="folder-without-images")
        return images
    if not os.path.exists(path):
        raise DataError(f"the image {path!r} does not exist{where}", code="image-missing")
    if not os.path.isfile(path):
        raise DataError(
            f"the image {path!r} is a pipe or a device, not a file{where}; - reads an image from standard input",
            code="image-not-file",
        )
    return table_images(path, option=f"the table{where}") if is_table(path) else [path]


def _matching(pattern: str) -> Iterator[str]:
    """Yield the files that a pattern matches, and the images below the folders that it matches.

    A pattern without a literal suffix, such as `photos/*`, matches images only.
    """
    parts = pattern.replace(os.sep, "/").split("/")
    suffix = os.path.splitext(parts[-1])[1]
    any_file = bool(suffix) and not glob.has_magic(suffix)
    if _RECURSIVE not in parts:
        for match in glob.glob(pattern):
            if os.path.isdir(match):
                yield from image_files(match)
            elif (any_file or is_image_name(match)) and (os.path.isfile(match) or not os.path.exists(match)):
                yield match
        return
    # Not with `glob`, which loops where links lead back up.
    first = parts.index(_RECURSIVE)
    above, below = "".join(f"{part}/" for part in parts[:first]), [part for part in parts[first:] if part]
    for folder in glob.glob(above) if glob.has_magic(above) else [above]:
        for file in files_below(folder or os.curdir) if os.path.isdir(folder or os.curdir) else ():
            names = file.split("/")
            is_image = is_image_name(file)
            if ((any_file or is_image) and _matches(names, below)) or (
                is_image and any(_matches(names[:depth], below) for depth in range(1, len(names)))
            ):
                yield folder + file


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern; both are split at the slashes."""
    if not pattern:
        return not names
    if pattern[0] == _RECURSIVE:
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _entries(content: bytes) -> list[tuple[int, str]] | None:
    """Return the entries of a list of paths, numbered from 1, or None if the content is an image.

    Raises:
        DataError: it is empty.
    """
    separator = b"\0" if b"\0" in content else b"\n"
    first = next((entry for entry in content[: 1 << 16].split(separator) if _text(entry)), b"")
    if not first and not content.strip(b"\0\r\n"):
        raise DataError(
            "standard input is empty; - takes the bytes of an image, or paths, one a line", code="stdin-empty"
        )
    if not os.path.lexists(_text(first)) and _is_image(content):
        return None
    entries = enumerate(map(_text, content.split(separator)), 1)
    return [(number, entry) for number, entry in entries if entry]


def _text(entry: bytes) -> str:
    """Return an entry as a file name, without the carriage return of Windows' line ends."""
    return os.fsdecode(entry.removesuffix(b"\r"))


def _is_image(content: bytes) -> bool:
    """Whether it is an image, perhaps a damaged one; PPM can be text."""
    if _BINARY.intersection(content[:_BEGINNING]):
        return True
    from shufflenet_mlflow.data.formats import UnreadableImageError, open_image  # imports Pillow

    try:
        with open_image(BytesIO(content)):
            return True
    except (UnreadableImageError, OSError, ValueError):
        return False
