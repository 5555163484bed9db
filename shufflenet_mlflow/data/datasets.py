"""Data sets that a command can name: an image folder, a table of images, or the bundled digits."""

import os
from pathlib import Path

import numpy as np

from shufflenet_mlflow.config import DEFAULT_VAL_FRACTION, default_cache_dir
from shufflenet_mlflow.data.digits import cached_digits
from shufflenet_mlflow.data.division import Division, Sides, divide
from shufflenet_mlflow.data.folder import (
    by_suffix,
    is_image_name,
    list_images,
    require_images_only,
    with_same_classes,
)
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.table import is_table, list_table
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.text import counted, name_some

DIGITS_NAME = "digits"


_GENERIC = ("train", "training", "val", "valid", "validation", "test")
"""Names of folders that say which part of a data set they hold, and not which data set."""


def data_name(directory: str | None) -> str:
    """Return a data set's name: that of its folder or table, or of the folder of one called train, val or similar."""
    if directory is None:
        return DIGITS_NAME
    path = Path(directory)
    path = path.with_suffix("") if is_table(path) else path
    return path.parent.name if path.name.lower() in _GENERIC and path.parent.name else path.name


def evaluation_names(directory: str | None, part: str | None = None) -> list[str]:
    """Return names for images to evaluate on, such as `pets-test` for `pets/test`.

    Args:
        part: of the folder's images, such as `val`; None for all.

    Returns:
        The shortest that says which images they are, and those that name one, two, … more of the folders above.
    """
    ending = () if part is None else (part,)
    if directory is None:
        return ["-".join((DIGITS_NAME, *ending))]
    path = Path(os.path.abspath(directory))
    path = path.with_suffix("") if is_table(path) else path
    folders = [name for name in path.parts if name != path.anchor] or [DIGITS_NAME]
    fewest = 2 if path.name.lower() in _GENERIC and len(folders) > 1 else 1
    return ["-".join((*folders[-count:], *ending)) for count in range(fewest, len(folders) + 1)]


def list_sides(
    train_dir: str | None,
    val_dir: str | None,
    *,
    val_fraction: float | None,
    group_by: str | None,
    seed: int,
    skip_bad: bool,
    cache_dir: Path | None,
    reporter: Reporter,
) -> Sides:
    """List training and validation images: two folders or tables, or one that is divided, or the bundled digits.

    Args:
        val_fraction, group_by: None if they were not asked for; see `Division`.
        seed: of the division.
        skip_bad, cache_dir, reporter: see `list_folder`.

    Raises:
        DataError: see `list_folder` and `divide`; or the two sides have different classes.
    """
    if train_dir is None or val_dir is not None:
        train, val = (
            list_folder(
                directory, part, option=f"--{part}-dir", skip_bad=skip_bad, cache_dir=cache_dir, reporter=reporter
            )
            for directory, part in ((train_dir, "train"), (val_dir, "val"))
        )
        _require_every_class(train, "--train-dir")
        _require_every_class(val, "--val-dir")
        val = with_same_classes(train.class_to_idx, val, expected_in=repr(str(train.source)), option="--val-dir")
        return Sides(train, val)
    whole = list_whole(train_dir, option="--train-dir", skip_bad=skip_bad, reporter=reporter)
    if whole.splits is not None:
        if val_fraction is not None or group_by is not None:
            raise columns_divide(train_dir, "--train-dir")
        train, val = (rows_of(whole, split, option="--train-dir") for split in ("train", "val"))
        if divided := _divided_groups(whole):
            reporter.warn(f"{train_dir!r} has group {name_some(divided, shown_as=repr)} in training and in validation")
        _require_every_class(train, "--train-dir", " with split train")
        _require_every_class(val, "--train-dir", " with split val")
        return Sides(train, val)
    if beside := _validation_folder_beside(Path(train_dir)):
        reporter.warn(f"{str(beside)!r} is not used; --val-dir names validation images")
    division = Division(DEFAULT_VAL_FRACTION if val_fraction is None else val_fraction, group_by, seed)
    sides = divide(whole, division, option="--train-dir")
    groups = "" if sides.groups is None else f"; {sides.groups_in_words()}"
    reporter.note(
        f"no --val-dir: {train_dir!r} is divided into {len(sides.train):,} training and "
        f"{counted(len(sides.val), 'validation image')} (--val-fraction {division.val_fraction:g}{groups})"
    )
    return sides


def columns_divide(source: str, option: str) -> DataError:
    """Return the error of a table that is to be divided although it says itself how."""
    return DataError(
        f"{option} {source!r} has a column 'split', which says what is for validation; leave out --val-fraction and "
        "--group-by, or remove the column",
        code="val-fraction-and-column",
    )


def list_folder(
    directory: str | None, split: str, *, option: str, skip_bad: bool, cache_dir: Path | None, reporter: Reporter
) -> ImageListing:
    """List `directory`, a folder or a table, or the bundled digits if it is None.

    Args:
        split: of the digits, `train` or `val`; of a table with a column for it, also `test`.
        option: what to call the folder in messages.
        skip_bad: allow files that are not images.
        reporter: told of the files that are left out.
        cache_dir: where the digits are kept; by default in the user's cache folder.

    Raises:
        DataError: see `list_images` and `list_table`; or it holds files that are not images, and `skip_bad` is False.
    """
    if directory is None:
        return list_images(cached_digits(cache_dir or default_cache_dir()) / split)
    listing = list_whole(directory, option=option, skip_bad=skip_bad, reporter=reporter)
    return rows_of(listing, split, option=option) if listing.splits is not None else listing


def list_whole(directory: str, *, option: str, skip_bad: bool, reporter: Reporter) -> ImageListing:
    """List a folder or a table whole, with the table's columns; see `list_folder`."""
    if is_table(directory):
        return list_table(directory, option=option, skip_missing=skip_bad)
    listing = list_images(directory, option=option)
    if not skip_bad:
        require_images_only(listing, option=option)
    if listing.merged:
        reporter.note(
            f"{option} {directory!r}: folders whose names look the same are one class: {name_some(listing.merged)}"
        )
    left_out = [*listing.foreign, *listing.loose]
    if left_out:
        tell = reporter.warn if any(map(is_image_name, listing.loose)) else reporter.note
        beside = f", {len(listing.loose)} of them outside the class folders" if listing.loose else ""
        tell(f"{option} {directory!r}: left out {by_suffix(left_out)}{beside}")
    return listing


def rows_of(listing: ImageListing, split: str, *, option: str) -> ImageListing:
    """Return the images of one split of a table, with all classes of the table.

    Raises:
        DataError: there are none.
    """
    splits = listing.splits or ()
    is_of_split_N = np.array([word == split for word in splits], bool)
    if not is_of_split_N.any():
        raise DataError(
            f"{option} {str(listing.source)!r} has no row with split {split}, only with "
            f"{', '.join(sorted(set(splits)))}",
            code="table-split-empty",
        )
    return listing.only(is_of_split_N)


def _divided_groups(listing: ImageListing) -> list[str]:
    """Return the groups that a table has both in training and in validation."""
    if listing.table is None or listing.table.groups is None or listing.table.splits is None:
        return []
    rows = {*zip(listing.table.splits, listing.table.groups, strict=True)}
    return sorted(group for split, group in rows if split == "train" and group and ("val", group) in rows)


def _validation_folder_beside(train_dir: Path) -> Path | None:
    """Return the folder of validation images that somebody forgot to name, to judge by its name."""
    if train_dir.name.lower() not in ("train", "training"):
        return None
    candidates = (train_dir.with_name(name) for name in ("val", "valid", "validation"))
    return next((folder for folder in candidates if folder.is_dir()), None)


def _require_every_class(listing: ImageListing, option: str, rows: str = "") -> None:
    """Raise DataError if a class of a table has no row."""
    count_L = np.bincount(listing.samples.labels, minlength=len(listing.classes))
    if lacking := [listing.classes[label] for label in np.flatnonzero(count_L == 0)]:
        raise DataError(
            f"{option} {str(listing.source)!r} has no row{rows} of class {name_some(lacking, shown_as=repr)}; "
            "add some, or remove the class",
            code="table-class-missing",
        )
