"""Divide one set of images into training and validation images.

An image's side follows from a hash of its path and the seed alone: it is for validation if the hash, as a fraction of
the largest one, is below `val_fraction`. So images that are added later move no other. Where images form groups, the
group's name takes the place of the path, and the group stays together.

Only where that leaves a class without an image on one side, one of its images (or groups) is moved there: the one whose
hash is closest to the fraction. Such a class is small, and only there can an image that is added later move another.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shufflenet_mlflow.config import DEFAULT_VAL_FRACTION
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.text import counted, name_some

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class Division:
    """The rule that divides a set of images."""

    val_fraction: float = DEFAULT_VAL_FRACTION
    """Share of each class that is for validation, about; in (0, 1)."""
    group_by: str | None = None
    """Regular expression that finds an image's group in its path: its first group, or else the whole match."""
    seed: int = 0


@dataclass(frozen=True)
class Sides:
    """Training and validation images."""

    train: ImageListing
    val: ImageListing
    division: Division | None = None
    """How one set was divided; None if there are two, or a table says which is which."""
    groups: int | None = None
    """Number of groups that were kept together; None if there are none."""
    alone: int = 0
    """Number of images without a group."""

    def groups_in_words(self) -> str:
        """Return how many groups there are, for a message."""
        alone = f" and {counted(self.alone, 'image')} without one" if self.alone else ""
        return counted(self.groups or 0, "group") + alone


def divide(listing: ImageListing, division: Division, *, option: str) -> Sides:
    """Divide the images of a listing.

    Args:
        option: what to call the listing in messages, such as `--train-dir`.

    Raises:
        DataError: a class, or everything, has one image or one group only, or the classes are no classes.
    """
    name = f"{option} {str(listing.source)!r}"
    if {folder.lower() for folder in listing.classes} <= SPLIT_NAMES and "train" in listing.classes:
        raise DataError(
            f"{name} holds the folders {name_some(listing.classes, shown_as=repr)}, which are not classes; give "
            f"{option} {str(listing.root / 'train')!r} and the folder of validation images",
            code="folder-of-splits",
        )
    groups = groups_of(listing, division, option=option)
    units, unit_N = units_of(listing, groups)
    if len(units) == 1 and len(listing) > 1:
        raise DataError(
            f"{name}: all of its {counted(len(listing), 'image')} are in one group, {units[0]!r}; pass another "
            "--group-by, or none",
            code="one-group-only",
        )
    hash_U = np.array([unit_hash(unit, division.seed) for unit in units])
    is_val_U = _with_all_classes(listing, hash_U, unit_N, division, name, in_groups=groups is not None)
    is_val_N = is_val_U[unit_N]
    alone = sum(not group for group in groups or ())
    number = None if groups is None else len(units) - alone
    return Sides(listing.only(~is_val_N), listing.only(is_val_N), division, number, alone)


def groups_of(listing: ImageListing, division: Division, *, option: str) -> list[str] | None:
    """Return the name of each image's group, empty for one without; None if there are no groups.

    Raises:
        DataError: the pattern matches no path, or the table names groups as well.
    """
    name = f"{option} {str(listing.source)!r}"
    in_table = None if listing.table is None else listing.table.groups
    if division.group_by is None:
        return None if in_table is None else [unicodedata.normalize("NFC", group) for group in in_table]
    if in_table is not None:
        raise DataError(
            f"{name} has a column 'group', and --group-by (={division.group_by}) excludes it; leave one of them out",
            code="group-by-and-column",
        )
    pattern = re.compile(unicodedata.normalize("NFC", division.group_by))
    groups = []
    for path in _paths(listing):
        match = pattern.search(path)
        groups.append("" if match is None else match[1 if pattern.groups else 0] or "")
    if not any(groups):
        raise DataError(
            f"--group-by (={division.group_by}) matches none of the paths in {name}, such as {next(_paths(listing))!r}",
            code="group-by-without-match",
        )
    return groups


def _paths(listing: ImageListing) -> Iterator[str]:
    """Yield the paths as text in one form of Unicode, which are the same on every system."""
    for path, _ in listing.samples.encoded():
        text = path.decode("utf-8", "surrogateescape")
        yield text if text.isascii() else unicodedata.normalize("NFC", text)


def units_of(listing: ImageListing, groups: Sequence[str] | None) -> tuple[list[str], NDArray[np.int64]]:
    """Return what is kept together, by name, and int64 (N): the unit of each image.

    An image without a group is a unit of its own. Its path cannot be taken for a group: it follows a NUL.
    """
    if groups is None:
        return list(_paths(listing)), np.arange(len(listing))
    numbers: dict[str, int] = {}
    names = (group or f"\0{path}" for group, path in zip(groups, _paths(listing), strict=True))
    unit_N = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    return [name.removeprefix("\0") for name in numbers], unit_N


def unit_hash(unit: str, seed: int) -> float:
    """Return a number in [0, 1) that is as good as random, and the same everywhere."""
    text = unit.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=6, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**48


def _with_all_classes(
    listing: ImageListing,
    hash_U: NDArray[np.float64],
    unit_N: NDArray[np.int64],
    division: Division,
    name: str,
    *,
    in_groups: bool,
) -> NDArray[np.bool_]:
    """Return bool (U), whether each unit is for validation, such that no class lacks images on either side.

    Raises:
        DataError: a class has one unit only, or no move gives every class images on both sides.
    """
    is_val_U: NDArray[np.bool_] = hash_U < division.val_fraction
    labels = len(listing.classes)
    pairs = np.unique(unit_N * labels + listing.samples.labels)
    unit_P, label_P = pairs // labels, pairs % labels
    count_L = np.bincount(label_P, minlength=labels)
    if single := [listing.classes[label] for label in np.flatnonzero(count_L == 1)]:
        what = "group" if in_groups else "image"
        raise DataError(
            f"{name}: there is one {what} only of class {name_some(single, shown_as=repr)}, and it cannot be divided; "
            f"add {what}s, {'pass another --group-by, ' if in_groups else ''}or remove the class",
            code="class-of-one",
        )
    counts_L2 = np.stack([np.bincount(label_P[is_val_U[unit_P] == side], minlength=labels) for side in (0, 1)], 1)
    for label in np.flatnonzero((counts_L2 == 0).any(1)):
        to = 1 if counts_L2[label, 1] == 0 else 0
        if counts_L2[label, to]:
            continue  # another class's unit has brought some along
        candidates = unit_P[label_P == label]
        for unit in candidates[np.argsort(np.abs(hash_U[candidates] - division.val_fraction), kind="stable")]:
            moved = label_P[unit_P == unit]
            if (counts_L2[moved, 1 - to] > 1).all():
                is_val_U[unit] = bool(to)
                counts_L2[moved, to] += 1
                counts_L2[moved, 1 - to] -= 1
                break
        else:
            raise DataError(
                f"{name}: its groups do not divide so that class {listing.classes[label]!r} is on both sides; try "
                "another --seed, or another --group-by",
                code="groups-do-not-divide",
            )
    return is_val_U
