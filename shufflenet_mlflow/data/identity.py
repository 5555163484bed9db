"""The identity of a set of images, as checkpoints store it, and how two sets differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.runtime.text import name_some

MOST_CLASSES = 1000
"""Classes up to which each has its own digest; beyond, only the whole set does, so that checkpoints stay small."""


@dataclass(frozen=True)
class DataIdentity:
    """Digests of a set of images. Where it lies does not count."""

    digest: str | None
    """Digest of paths and sizes; None if it is not known."""
    content_digest: str | None
    """Digest of paths and contents; None for a large set, whose content is not read."""
    counts: Mapping[str, int]
    """Images of each class; empty if not known."""
    class_digests: Mapping[str, str]
    """Digest of each class; empty if not known."""

    @classmethod
    def of(cls, listing: ImageListing, *, with_content: bool = True) -> "DataIdentity":
        """Return the identity of a folder's images.

        Args:
            with_content: read the files, unless they are large.
        """
        with_content = with_content and listing.is_small
        content = listing.content_digest if with_content else None
        if len(listing.classes) > MOST_CLASSES:
            return cls(listing.digest, content, {}, {})
        digests = dict(zip(listing.classes, listing.class_digests, strict=True)) if with_content else {}
        return cls(listing.digest, content, _counts(listing), digests)

    @classmethod
    def from_payload(cls, stored: Mapping[str, Any], part: str) -> "DataIdentity":
        """Return the identity that a checkpoint stores; version 0.1.0 stored only a digest of paths and sizes.

        Args:
            part: `train` or `val`.
        """
        text = [stored.get(f"{part}_{name}") for name in ("digest", "content_digest")]
        digest, content = (value if isinstance(value, str) else None for value in text)
        tables = [stored.get(f"{part}_{name}") for name in ("counts", "class_digests")]
        counts, digests = (value if isinstance(value, dict) else {} for value in tables)
        return cls(digest, content, counts, digests)

    def to_payload(self, part: str) -> dict[str, Any]:
        """Return plain entries for a checkpoint."""
        return {
            f"{part}_digest": self.digest,
            f"{part}_content_digest": self.content_digest,
            f"{part}_counts": dict(self.counts),
            f"{part}_class_digests": dict(self.class_digests),
        }

    @property
    def is_known(self) -> bool:
        """Whether there is anything to compare with."""
        return self.digest is not None or self.content_digest is not None

    @property
    def shown(self) -> str:
        """The digest that says most, as text."""
        return self.content_digest or self.digest or "unknown"

    def difference(self, listing: ImageListing, *, with_content: bool = True) -> str | None:
        """Say how a folder's images differ from these; None if they do not, as far as is known.

        Args:
            with_content: as for `of`.
        """
        same_files = self.digest is None or self.digest == listing.digest
        comparable = with_content and listing.is_small and self.content_digest is not None
        if same_files and (not comparable or self.content_digest == listing.content_digest):
            return None
        now = _counts(listing)
        if classes := _changed_classes(self.counts, now):
            return classes
        moved = [
            f"{name!r} ({self.counts[name]} -> {now[name]} images)"
            for name in listing.classes
            if name in self.counts and self.counts[name] != now[name]
        ]
        if moved:
            added, removed = _added_and_removed(self.counts, now)
            changes = [f"{count} files {what}" for count, what in ((added, "added"), (removed, "removed")) if count]
            return f"{', '.join(changes)} in class {name_some(moved)}"
        what = "files changed in content" if same_files else "files renamed or of another size"
        changed: list[str] = []
        if comparable and self.class_digests:
            of_class = dict(zip(listing.classes, listing.class_digests, strict=True))
            changed = [name for name in listing.classes if self.class_digests.get(name) != of_class[name]]
        return what + (f" in class {name_some(changed, shown_as=repr)}" if changed else "")


def _counts(listing: ImageListing) -> dict[str, int]:
    numbers = [0] * len(listing.classes)
    for label in listing.samples.labels.tolist():
        numbers[label] += 1
    return dict(zip(listing.classes, numbers, strict=True))


def _changed_classes(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """Say which classes are new and which are gone; empty text if none are, or if that is not known."""
    changes = ((now.keys() - before.keys(), "added"), (before.keys() - now.keys(), "removed")) if before else ()
    return ", ".join(f"class {name_some(sorted(names), shown_as=repr)} {what}" for names, what in changes if names)


def _added_and_removed(before: Mapping[str, int], now: Mapping[str, int]) -> tuple[int, int]:
    changes = [now[name] - before.get(name, 0) for name in now]
    return sum(change for change in changes if change > 0), -sum(change for change in changes if change < 0)
