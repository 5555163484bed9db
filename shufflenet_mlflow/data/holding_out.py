"""Hold images back from the training of a supernet: a search scores its networks on them.

A fifth of each class is held out, and at most 50,000 images of all classes together, as in the paper (arXiv:1904.00420,
sec. 4, takes 50 of each class of ImageNet). Which ones follows from a hash of path and seed, as in `division`; images
of one group stay together.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shufflenet_mlflow.data.division import Division, groups_of, unit_hash, units_of
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.text import name_some

SHARE = 5
"""One of so many images of a class is held out."""
MOST_IMAGES = 50_000

STREAM = "held out: "
"""Put before what is hashed: the hashes of `division` have decided already which images are for training."""


class HeldOut(NamedTuple):
    """Training images without those that are held out, and these."""

    train: ImageListing
    scoring: ImageListing


def hold_out(listing: ImageListing, division: Division | None, seed: int, *, option: str) -> HeldOut:
    """Divide the training images of a supernet.

    Args:
        division: how validation images were divided off, with the pattern of the groups; None if they were not.
        seed: of the run.
        option: what to call the listing in messages, such as `--train-dir`.

    Raises:
        DataError: a class would have no image on one side.
    """
    labels, classes = listing.samples.labels, len(listing.classes)
    groups = groups_of(listing, division or Division(), option=option)
    units, unit_N = units_of(listing, groups)
    hash_U = np.array([unit_hash(STREAM + unit, seed) for unit in units])
    quota_L = np.minimum(np.bincount(labels, minlength=classes) // SHARE, max(1, MOST_IMAGES // classes))
    rank_N = _rank_in_class(hash_U[unit_N], labels)
    is_held_N = rank_N < quota_L[labels]
    if groups is not None:
        is_held_N = np.isin(unit_N, unit_N[is_held_N])
    counts_L2 = np.stack([np.bincount(labels[is_held_N == side], minlength=classes) for side in (False, True)], 1)
    if lacking := [listing.classes[label] for label in np.flatnonzero((counts_L2 == 0).any(1))]:
        raise DataError(
            f"{option} {str(listing.source)!r}: a supernet's training holds out one image in {SHARE} of each class, "
            f"and class {name_some(lacking, shown_as=repr)} has too few{'' if groups is None else ' groups'}; add "
            f"images{'' if groups is None else ' or groups'}, or remove the class",
            code="too-few-to-hold-out",
        )
    return HeldOut(listing.only(~is_held_N).without_columns(), listing.only(is_held_N).without_columns())


def some_of_each_class(listing: ImageListing, images: int, seed: int) -> ImageListing:
    """Return at most so many images, equally many of each class as far as there are, and at least one."""
    hash_N = np.array([unit_hash(STREAM + unit, seed) for unit in units_of(listing, None)[0]])
    most = max(1, images // len(listing.classes))
    return listing.only(_rank_in_class(hash_N, listing.samples.labels) < most)


def _rank_in_class(hash_N: NDArray[np.float64], labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return int64 (N): how many images of its class have a lower hash."""
    order_N = np.lexsort((np.arange(len(labels)), hash_N, labels))
    firsts_L = np.searchsorted(labels[order_N], np.arange(labels.max(initial=0) + 1))
    rank_N = np.empty(len(labels), np.int64)
    rank_N[order_N] = np.arange(len(labels)) - firsts_L[labels[order_N]]
    return rank_N
