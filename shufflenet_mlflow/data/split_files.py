"""Write divided images as folders of links, or as a table."""

import csv
import io
import os
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shufflenet_mlflow.data.folder import is_image_name
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.files import new_folder, write_atomically


def write_folders(folder: Path, sides: Mapping[str, ImageListing]) -> str:
    """Write `folder`/SPLIT/CLASS/… for the images of each split; it appears whole or not at all.

    Each file is a hard link, or else a symbolic link, or else a copy.

    Returns:
        How the files were written: `hard links`, `symbolic links` or `copies`.

    Raises:
        DataError: `folder` exists and is not empty, or cannot be written; or the name of a class or an image cannot be
            one there.
    """
    for name in next(iter(sides.values())).classes:
        if "/" in name or "\0" in name or name.startswith("."):
            raise DataError(
                f"the label {name!r} cannot be the name of a folder; rename the class, or pass --manifest",
                code="label-not-folder",
            )
    for sample in (sample for listing in sides.values() for sample in listing.samples):
        if not is_image_name(sample.path) or any(part.startswith(".") for part in sample.path.split("/")):
            raise DataError(
                f"{sample.path!r} is no image in a folder, by its suffix or because it is hidden; rename it, or pass "
                "--manifest",
                code="split-not-image-name",
            )
    link = _Linking()
    try:
        with new_folder(folder) as aside:
            for split, listing in sides.items():
                for sample in listing.samples:
                    name = "" if listing.has_class_folders else listing.classes[sample.label]
                    target = aside / split / name / sample.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    link(listing.root / sample.path, target)
    except FileExistsError as error:
        raise DataError(
            f"{str(folder)!r} exists and is not empty; name a new folder", code="split-folder-not-empty"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    return link.kind


class _Linking:
    """Links files in the best way that has worked so far."""

    def __init__(self) -> None:
        self._ways: list[tuple[str, Callable[[str, Path], object]]] = [
            ("hard links", os.link),
            ("symbolic links", os.symlink),
            ("copies", shutil.copy2),
        ]

    @property
    def kind(self) -> str:
        """How the last file was written."""
        return self._ways[0][0]

    def __call__(self, source: Path, target: Path) -> None:
        whole = os.path.realpath(source)
        while True:
            try:
                self._ways[0][1](whole, target)
                return
            except OSError:
                if len(self._ways) == 1 or not os.path.exists(whole):
                    raise
                del self._ways[0]


def write_table(
    path: Path, sides: Mapping[str, ImageListing], groups: Mapping[str, str] | None, *, images: Path
) -> None:
    """Write a CSV table with the columns path, label and split, and group where there are groups.

    Args:
        groups: path of an image -> name of its group.
        images: folder of the images; `path` must lie in it or above.

    Raises:
        DataError: the file exists or cannot be written, lies elsewhere, or a name is not text.
    """
    if os.path.lexists(path):
        raise DataError(f"{str(path)!r} exists; name a new file", code="split-table-exists")
    here, root = Path(os.path.realpath(path.parent)), Path(os.path.realpath(images))
    if not root.is_relative_to(here):
        raise DataError(
            f"{str(path)!r} does not lie in {str(root)!r} or above, which a table's paths need; write it to "
            f"{str(root / path.name)!r}",
            code="split-table-elsewhere",
        )
    below = root.relative_to(here).as_posix()
    rows: list[Sequence[str]] = [("path", "label", "split", *(() if groups is None else ("group",)))]
    for split, listing in sides.items():
        for sample in listing.samples:
            name = sample.path if below == "." else f"{below}/{sample.path}"
            label = unicodedata.normalize("NFC", listing.classes[sample.label])
            rows.append((name, label, split, *(() if groups is None else (groups[sample.path],))))
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    try:
        content = text.getvalue().encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a file below {str(root)!r} has a name that is not UTF-8, which a table cannot hold; rename it",
            code="split-name-not-text",
        ) from error
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write {str(path)!r}: {error.strerror or error}; name another place", code="split-unwritable"
    )
