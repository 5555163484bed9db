"""Tables of images: CSV or Parquet files with the columns `path` and `label`, and perhaps `split` and `group`.

Paths are relative to the table's folder. CSV is read with the standard library, which keeps every cell as the text that
it is (a label 01 stays 01) and knows its row; Parquet with pyarrow, which comes with MLflow.
"""

import csv
import io
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.data.listing import ImageListing, Samples, Table
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.text import counted, name_some

TABLE_SUFFIXES = (".csv", ".parquet")

LARGEST_TABLE = 1 << 29
"""Most bytes of a table; ten million images take half of it."""
MOST_ROWS = 20_000_000
"""Most rows of a Parquet file, whose size says little about them."""

COLUMNS = ("path", "label", "split", "group", "weight")
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Word in the column `split` -> the split that it means."""

_ABSOLUTE = re.compile(r"/|\\|[A-Za-z]:[\\/]")


def is_table(path: str | Path) -> bool:
    """Whether a path names a table rather than a folder, by its suffix."""
    return str(path).lower().endswith(TABLE_SUFFIXES) and not os.path.isdir(path)


def list_table(path: str | Path, *, option: str, skip_missing: bool = False) -> ImageListing:
    """List the images of a table.

    Args:
        option: what to call the table in messages, such as `--train-dir`.
        skip_missing: list images that do not exist, too; they are unreadable.

    Raises:
        DataError: the table cannot be read or used; the message names the row and its value.
    """
    rows = _read(Path(path), option)
    if "weight" in rows.columns:
        raise DataError(
            f"{rows.name}: the column 'weight' is not supported: every image counts the same; remove it",
            code="table-weight",
        )
    paths, sizes = rows.images(skip_missing=skip_missing)
    labels = [unicodedata.normalize("NFC", label) for label in rows.values("label")]
    for index, label in enumerate(labels):
        if label.lower() == "nan":
            raise DataError(
                f"{rows.at(index)}: the label {label!r} looks like a missing value; give the class a name",
                code="table-label-nan",
            )
    splits = [rows.split(index) for index in range(len(rows))] if "split" in rows.columns else None
    groups = [group or "" for group in rows.columns["group"]] if "group" in rows.columns else None
    rows.require_agreement(paths, {"label": labels, "split": splits, "group": groups})
    classes = tuple(sorted(set(labels)))
    first = {path: index for index, path in reversed(list(enumerate(paths)))}
    order = sorted(first.values(), key=lambda index: (labels[index], paths[index]))
    label_of = {name: label for label, name in enumerate(classes)}
    return ImageListing(
        Path(path).parent,
        classes,
        Samples.of((paths[index], label_of[labels[index]], sizes[index]) for index in order),
        table=Table(
            Path(path),
            None if splits is None else tuple(splits[index] for index in order),
            None if groups is None else tuple(groups[index] for index in order),
        ),
        has_class_folders=all(
            unicodedata.normalize("NFC", paths[index]).startswith(f"{labels[index]}/") for index in order
        ),
    )


def table_images(path: str | Path, *, option: str) -> list[str]:
    """Return the paths of a table's images in the order of its rows; it need not have labels.

    Raises:
        DataError: see `list_table`.
    """
    rows = _read(Path(path), option, required=("path",))
    paths, _ = rows.images(skip_missing=False)
    return [os.path.join(os.path.dirname(path), name) for name in paths]


@dataclass(frozen=True)
class _Rows:
    """The cells of a table."""

    path: Path
    name: str
    """Option and path, for messages."""
    columns: Mapping[str, Sequence[str | None]]
    numbers: Sequence[int]
    """Number of each row, as a spreadsheet shows it."""

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, index: int) -> str:
        """Return the beginning of a message about a row."""
        return f"{self.name}, row {self.numbers[index]}"

    def values(self, column: str) -> list[str]:
        """Return the cells of a column, none of which may be empty."""
        cells = self.columns[column]
        for index, cell in enumerate(cells):
            if not cell or not cell.strip():
                raise DataError(
                    f"{self.at(index)}: the {column} is missing; fill it in or remove the row",
                    code="table-value-missing",
                )
        return [str(cell) for cell in cells]

    def split(self, index: int) -> str:
        """Return the split of a row."""
        word = self.columns["split"][index] or ""
        found = SPLIT_OF.get(word.strip().lower())
        if found is None:
            raise DataError(
                f"{self.at(index)}: the split {word!r} is none of train, val and test", code="table-split-unknown"
            )
        return found

    def images(self, *, skip_missing: bool) -> tuple[list[str], list[int]]:
        """Return the paths of the images, as the file system has them, and their sizes."""
        paths, sizes, missing = [], [], []
        for index, written in enumerate(self.values("path")):
            path = self._inside(index, written)
            found = _find(self.path.parent, path)
            if found is None:
                missing.append(index)
            elif not stat.S_ISREG(found[1].st_mode):
                raise DataError(
                    f"{self.at(index)}: the path {written!r} is a folder or a device, not a file",
                    code="table-path-not-file",
                )
            paths.append(path if found is None else found[0])
            sizes.append(0 if found is None else found[1].st_size)
        if missing and not skip_missing:
            more = f" (and {counted(len(missing) - 1, 'more file', 'more files')})" if len(missing) > 1 else ""
            first = self.columns["path"][missing[0]]
            hint = "; folders are separated by /" if "\\" in str(first) else ""
            raise DataError(
                f"{self.at(missing[0])}: the image {first!r} does not exist in {str(self.path.parent)!r}{more}{hint}; "
                "restore it or remove the row",
                code="table-image-missing",
            )
        return paths, sizes

    def _inside(self, index: int, path: str) -> str:
        """Return the path in its shortest form."""
        if _ABSOLUTE.match(path):
            raise DataError(
                f"{self.at(index)}: the path {path!r} is absolute; paths are relative to the table's folder",
                code="table-path-absolute",
            )
        shortest = posixpath.normpath(path)
        if shortest.split("/")[0] == "..":
            raise DataError(
                f"{self.at(index)}: the path {path!r} leads out of the table's folder; move the table to one "
                "above its images",
                code="table-path-outside",
            )
        return shortest

    def require_agreement(self, paths: Sequence[str], columns: Mapping[str, Sequence[str] | None]) -> None:
        """Raise DataError if two rows of one image differ in one of the columns."""
        first: dict[str, int] = {}
        for index, path in enumerate(paths):
            before = first.setdefault(path, index)
            for name, cells in columns.items() if before != index else ():
                if cells is not None and cells[before] != cells[index]:
                    raise DataError(
                        f"{self.at(index)}: the image {path!r} has the {name} {cells[index]!r}, and {cells[before]!r} "
                        f"in row {self.numbers[before]}; keep one of them",
                        code="table-rows-differ",
                    )


def _find(folder: Path, path: str) -> tuple[str, os.stat_result] | None:
    """Return the name and status of a file, in the form of Unicode in which it exists; None if it does not."""
    for form in dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))):
        try:
            name = os.fsdecode(form.encode())
            return name, os.stat(folder / name)
        except (OSError, ValueError):
            continue
    return None


def _read(path: Path, option: str, *, required: Sequence[str] = COLUMNS[:2]) -> _Rows:
    """Read the columns that are known.

    Raises:
        DataError: the file cannot be read, is too large, is not what its suffix says, or lacks columns or rows.
    """
    name = f"{option} {str(path)!r}"
    try:
        size = os.stat(path).st_size
        if size > LARGEST_TABLE:
            raise DataError(
                f"{name} has {size:,} bytes, and a table at most {LARGEST_TABLE:,}; divide it", code="table-too-large"
            )
        if not path.is_file():
            raise DataError(f"{name} is a pipe or a device, not a file", code="table-not-file")
        columns, numbers = (_read_csv if path.suffix.lower() == ".csv" else _read_parquet)(path, name)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}", code="table-unreadable") from error
    if missing := [column for column in required if column not in columns]:
        raise DataError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; its first row is "
            f"{name_some([*columns], most=6, shown_as=repr) or 'empty'}",
            code="table-column-missing",
        )
    if not numbers:
        raise DataError(f"{name} has no row below the names of its columns", code="table-empty")
    return _Rows(path, name, {column: columns[column] for column in COLUMNS if column in columns}, numbers)


def _read_csv(path: Path, name: str) -> tuple[dict[str, list[str | None]], list[int]]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: the byte 0x{content[error.start]:02X} is not UTF-8; save the table as CSV in UTF-8",
            code="table-encoding",
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(number, row) for number, row in enumerate(reader, 1) if row]
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: {error}", code="table-not-csv") from error
    header = rows[0][1] if rows else []
    _require_unlike(header, name)
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{name}, row {number}: it has {counted(len(row), 'cell')}, and the first row {len(header)}; a comma "
                "within a name needs quotes around the name",
                code="table-row-length",
            )
    columns: dict[str, list[str | None]] = {
        column: [row[index] for _, row in rows[1:]] for index, column in enumerate(header)
    }
    return columns, [number for number, _ in rows[1:]]


def _read_parquet(path: Path, name: str) -> tuple[dict[str, list[str | None]], list[int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        _require_unlike(names, name)
        rows = file.metadata.num_rows
        if rows > MOST_ROWS:
            raise DataError(f"{name} has {rows:,} rows, and a table at most {MOST_ROWS:,}", code="table-too-many-rows")
        read = file.read(columns=[column for column in names if column in COLUMNS])
        columns = {column: _texts(read.column(column), column, name) for column in read.column_names}
    except (pa.ArrowException, ValueError) as error:  # ValueError: text that is not UTF-8
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} is not a Parquet file that can be read: {reason}", code="table-not-parquet") from error
    return {column: columns.get(column, []) for column in names}, list(range(1, rows + 1))


def _texts(column: Any, column_name: str, name: str) -> list[str | None]:
    """Return the cells of a Parquet column as text."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_integer(kind) and column_name != "path":
        column, kind = column.cast(pa.string()), pa.string()
    if column_name != "weight" and not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    ):
        raise DataError(
            f"{name}: the column {column_name!r} is of type {kind}; store it as text", code="table-column-type"
        )
    texts: list[str | None] = column.to_pylist()
    return texts


def _require_unlike(names: Sequence[str], name: str) -> None:
    """Raise DataError if two columns have the same name."""
    if twice := [column for column in COLUMNS if list(names).count(column) > 1]:
        raise DataError(f"{name} has two columns {twice[0]!r}; remove one", code="table-column-twice")
