"""The images that a person names: files, folders, patterns, and what comes in on standard input."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from typing import BinaryIO

from shufflenet_mlflow.data.folder import files_below, image_files, is_image_name
from shufflenet_mlflow.data.listing import Samples
from shufflenet_mlflow.errors import ConfigError, DataError

STDIN = "-"
"""Stands for standard input, and for an image that came from there."""

_RECURSIVE = "**"
_BINARY = frozenset(range(0x20)) - set(b"\0\t\n\r")
"""Bytes that no list of paths begins with; a NUL may separate its entries."""
_BEGINNING = 1024


@dataclass(frozen=True)
class Pictures:
    """Images in the order in which they were named, each as often as it was named."""

    files: Samples
    """Their paths; labels and sizes are 0."""
    piped: bytes | None = None
    """The content of the image that came in on standard input."""
    piped_place: int = -1
    """Where among `files` that image stands."""

    def __len__(self) -> int:
        return len(self.files)

    def path(self, place: int) -> str:
        """Of one image; `STDIN` for the one that came in there."""
        return self.files[place].path

    def paths(self) -> Iterator[str]:
        """Of all of them, in order."""
        return (os.fsdecode(path) for path, _ in self.files.encoded())

    def source(self, place: int) -> str | BinaryIO:
        """What to decode: a path, or an open file."""
        return BytesIO(self.piped) if self.piped is not None and place == self.piped_place else self.path(place)


def find_pictures(named: Sequence[str], stdin: Callable[[], BinaryIO]) -> Pictures:
    """The images that are meant by words on a command line.

    A word is, in this order: `-`, an existing file, an existing folder (the images below it, sorted), or a pattern (the
    files that it matches, sorted; `**` stands for any number of folders). `~` at the beginning is expanded, unless
    there is something of that very name. Hidden files are found only by name.

    Standard input holds one image, or paths of files and folders: separated by NUL if there is one in it, otherwise
    one a line. A list is what begins with the path of something that exists, or looks like text and Pillow does not
    open it.

    Args:
        stdin: opens standard input; called if it is named.

    Raises:
        ConfigError: standard input is named twice.
        DataError: something does not exist, or holds no image.
    """
    if list(named).count(STDIN) > 1:
        raise ConfigError("standard input (-) can be named only once", code="stdin-twice")
    paths: list[str] = []
    piped, place = None, -1
    for word in named:
        if word != STDIN:
            paths += _named(word)
            continue
        content = stdin().read()
        entries = _entries(content)
        if entries is None:
            piped, place = content, len(paths)
            paths.append(STDIN)
            continue
        for number, entry in entries:
            paths += _existing(entry, f" (entry {number} on standard input)")
    return Pictures(Samples.of((path, 0, 0) for path in paths), piped, place)


def _named(word: str) -> list[str]:
    """What one word means.

    Raises:
        DataError: nothing.
    """
    if not os.path.exists(word):
        word = os.path.expanduser(word)
        if glob.has_magic(word) and not os.path.exists(word):
            found = sorted(_matching(word))
            if not found:
                raise DataError(f"no image matches the pattern {word!r}", code="pattern-without-match")
            return found
    return _existing(word)


def _existing(path: str, where: str = "") -> list[str]:
    """The file, or the images below the folder.

    Args:
        where: what to add to messages.

    Raises:
        DataError: it does not exist, or there is no image in it.
    """
    if os.path.isdir(path):
        found = image_files(path)
        if not found:
            raise DataError(f"the folder {path!r} holds no images{where}", code="folder-without-images")
        return found
    if not os.path.exists(path):
        raise DataError(f"the image {path!r} does not exist{where}", code="image-missing")
    return [path]


def _matching(pattern: str) -> Iterator[str]:
    """The files that a pattern matches, and the images below the folders that it matches.

    A pattern that does not spell out a suffix, such as `photos/*`, takes images only, as a folder does.
    """
    parts = pattern.replace(os.sep, "/").split("/")
    suffix = os.path.splitext(parts[-1])[1]
    any_file = bool(suffix) and not glob.has_magic(suffix)
    if _RECURSIVE not in parts:
        for match in glob.glob(pattern):
            if os.path.isdir(match):
                yield from image_files(match)
            elif any_file or is_image_name(match):
                yield match
        return
    # Not by `glob`, which goes round and round where links lead back up.
    first = parts.index(_RECURSIVE)
    above, below = "".join(f"{part}/" for part in parts[:first]), [part for part in parts[first:] if part]
    for folder in glob.glob(above) if glob.has_magic(above) else [above]:
        for file in files_below(folder or os.curdir) if os.path.isdir(folder or os.curdir) else ():
            names = file.split("/")
            is_image = is_image_name(file)
            if ((any_file or is_image) and _fits(names, below)) or (
                is_image and any(_fits(names[:depth], below) for depth in range(1, len(names)))
            ):
                yield folder + file


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, both in parts."""
    if not pattern:
        return not names
    if pattern[0] == _RECURSIVE:
        return any(_fits(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _entries(content: bytes) -> list[tuple[int, str]] | None:
    """The entries of a list of paths, with their numbers from 1; None if it is an image.

    Raises:
        DataError: there is nothing at all.
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
    """As Python spells file names, without what else than a newline ends a line elsewhere."""
    return os.fsdecode(entry.removesuffix(b"\r"))


def _is_image(content: bytes) -> bool:
    """Whether it is an image, if perhaps a damaged one; of images that are text only Pillow can tell."""
    if _BINARY.intersection(content[:_BEGINNING]):
        return True
    from PIL import Image

    try:
        with Image.open(BytesIO(content)):
            return True
    except Image.DecompressionBombError:
        return True
    except (OSError, ValueError):
        return False
