"""Groups of images that are the same file, or look the same.

Two images look the same if their perceptual hashes differ in at most `MOST_BITS` of 64 and, reduced to 8 x 8 pixels,
either their colours by at most `MOST_DIFFERENCE` of 255 on average, or their brightness correlates by at least
`LEAST_CORRELATION`. The hash alone takes different small photographs for the same; colours alone, whatever is evenly
coloured; correlation finds copies that are brighter or grey. The limits were measured: see `docs/own-images.md`.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shufflenet_mlflow.data.checking.images import Look

MOST_BITS = 10
MOST_DIFFERENCE = 12.0
LEAST_CORRELATION = 0.98
LEAST_CONTRAST = 1.0
"""Images with less have no features to compare."""
_ROWS = 1024


def same_files(looks: Sequence[Look]) -> list[list[Look]]:
    """Return the groups of two or more images with the same bytes, in the order of their first."""
    groups: dict[bytes, list[Look]] = defaultdict(list)
    for look in looks:
        if look.digest is not None:
            groups[look.digest].append(look)
    return [group for group in groups.values() if len(group) > 1]


def similar_images(looks: Sequence[Look]) -> list[list[Look]]:
    """Return the groups of images that look the same and have different bytes, in the order of their first.

    Of images with the same bytes, the first of each part and class stands for all. Takes time and memory with the
    square of the number of images: a second for 10,000.
    """
    distinct: dict[tuple[bytes, str, str], Look] = {}
    for look in looks:
        if look.digest is not None and look.bits is not None and look.contrast >= LEAST_CONTRAST:
            distinct.setdefault((look.digest, look.image.part, look.image.class_name), look)
    found = list(distinct.values())
    if len(found) < 2:
        return []
    groups: dict[int, list[Look]] = defaultdict(list)
    for look, label in zip(found, _connected(found), strict=True):
        groups[label].append(look)
    return [group for group in groups.values() if len({look.digest for look in group}) > 1]


def _connected(looks: Sequence[Look]) -> list[int]:
    """Return the number of each image's group, in which each is similar to at least one other."""
    signs_NB = np.stack([look.bits for look in looks if look.bits is not None]).astype(np.float32) * 2 - 1
    colours_NC = np.stack([look.colours for look in looks if look.colours is not None])
    patterns_NP = _patterns(colours_NC)
    count = len(looks)
    labels_N: NDArray[np.int32] = np.arange(count, dtype=np.int32)
    for begin in range(0, count, _ROWS):
        # The product of two signs is 1 for equal bits, and -1 for others.
        agreeing = signs_NB[begin : begin + _ROWS] @ signs_NB[begin:].T
        rows, columns = np.nonzero(agreeing >= signs_NB.shape[1] - 2 * MOST_BITS)
        is_pair = columns > rows
        rows, columns = rows[is_pair] + begin, columns[is_pair] + begin
        is_close = np.zeros(len(rows), np.bool_)
        for chunk in _slices(len(rows)):
            one, other = rows[chunk], columns[chunk]
            differences = np.abs(colours_NC[one].astype(np.int16) - colours_NC[other]).mean(1)
            correlations = (patterns_NP[one] * patterns_NP[other]).sum(1)
            is_close[chunk] = (differences <= MOST_DIFFERENCE) | (correlations >= LEAST_CORRELATION)
        if is_close.any():
            # SciPy 1.11 connects nothing by indices of 64 bits.
            edges = (
                np.concatenate([rows[is_close], np.arange(count)]).astype(np.int32),
                np.concatenate([columns[is_close], labels_N]).astype(np.int32),
            )
            ones = np.ones(len(edges[0]), np.bool_)
            graph = coo_array((ones, edges), shape=(count, count))  # type: ignore[no-untyped-call]
            components = connected_components(graph, directed=False)[1]
            first_of = np.unique(components, return_index=True)[1]
            labels_N = first_of[components].astype(np.int32)
    return [int(label) for label in labels_N]


def _patterns(colours_NC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the brightness of reduced images with mean 0 and length 1, so that products are correlations."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    grey_NP = colours_NC.reshape(len(colours_NC), -1, 3).astype(np.float32) @ weights
    grey_NP -= grey_NP.mean(1, keepdims=True)
    patterns_NP: NDArray[np.float32] = grey_NP / np.maximum(np.linalg.norm(grey_NP, axis=1, keepdims=True), 1e-6)
    return patterns_NP


def _slices(length: int) -> list[slice]:
    return [slice(begin, begin + (1 << 16)) for begin in range(0, length, 1 << 16)]
