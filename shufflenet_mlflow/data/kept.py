"""Listings of large image folders, kept in the user's cache so that the next start need not go through the files."""

import contextlib
import hashlib
import json
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shufflenet_mlflow.data.listing import ImageListing, Samples
from shufflenet_mlflow.runtime.files import write_atomically

KEPT_FROM = 20_000
"""Fewer files are listed faster than anybody notices."""

MOST_KEPT = 16
"""Older listings are removed: jobs that copy their images to a folder of their own would leave one each."""

_FORMAT = 1
_SETTLED_SECONDS = 2.0
"""A folder that changed so shortly before it was listed may change again without a newer time stamp."""
_SPOT_CHECKS = 200
"""Files whose size is looked at again: what is written over in place leaves its folder's time stamp as it was."""

Stamp = tuple[int, int, int]
"""When a folder was last changed, and when anything about it was, in nanoseconds; and its inode.

The first can be put back, as `tar` and `rsync -a` do; the second cannot."""

Stamps = dict[str, Stamp]
"""By folder, relative to the root."""


def stamp_of(status: os.stat_result) -> Stamp:
    """What tells whether an entry of a folder came, went or was renamed."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def keep(listing: ImageListing, stamps: Stamps, cache_dir: Path, began: float) -> None:
    """Keep a listing, unless it is small or its folder has only just changed. What cannot be written is not kept.

    Args:
        stamps: of the root and of every folder below it.
        began: when listing began, in seconds since the epoch.
    """
    newest = max(changed for _, changed, _ in stamps.values()) / 1e9
    if len(listing) < KEPT_FROM or newest > began - _SETTLED_SECONDS:
        return
    path = _path_for(listing.root, cache_dir)
    described = {
        "format": _FORMAT,
        "root": os.fspath(listing.root.absolute()),
        "classes": listing.classes,
        "foreign": listing.foreign,
        "stamps": stamps,
        "digest": listing.digest,
    }
    samples = listing.samples
    arrays: dict[str, Any] = {
        "described": np.frombuffer(json.dumps(described).encode("ascii"), np.uint8),
        "text": samples.text,
        "ends": samples.ends,
        "labels": samples.labels,
        "sizes": samples.sizes,
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays))
        for old in sorted(path.parent.glob("*.npz"), key=os.path.getmtime)[:-MOST_KEPT]:
            old.unlink(missing_ok=True)


def find(root: Path, cache_dir: Path) -> ImageListing | None:
    """The listing of `root` that was kept; None if there is none, or something has changed since."""
    try:
        with open(_path_for(root, cache_dir), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            described = json.loads(arrays["described"].tobytes())
            if described["format"] != _FORMAT or described["root"] != os.fspath(root.absolute()):
                return None
            if not _is_unchanged(root, described["stamps"]):
                return None
            samples = Samples(arrays["text"], arrays["ends"], arrays["labels"], arrays["sizes"])
        listing = ImageListing(root, tuple(described["classes"]), samples, tuple(described["foreign"]))
        if not _sizes_hold(listing):
            return None
        listing.__dict__["digest"] = described["digest"]  # where `cached_property` looks first
        return listing
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, zipfile.BadZipFile):
        return None  # absent, damaged, or of another version


def _path_for(root: Path, cache_dir: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]
    return cache_dir / "listings" / f"{name}.npz"


def _is_unchanged(root: Path, stamps: Mapping[str, list[int]]) -> bool:
    return all(list(stamp_of(os.stat(os.path.join(root, folder)))) == stamp for folder, stamp in stamps.items())


def _sizes_hold(listing: ImageListing) -> bool:
    places = random.SystemRandom().sample(range(len(listing)), min(_SPOT_CHECKS, len(listing)))
    chosen = [listing.samples[place] for place in places]
    return all(os.stat(listing.root / sample.path).st_size == sample.bytes for sample in chosen)
