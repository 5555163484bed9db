"""Digests of single images: short ones, by which two sets are compared without their files."""

import base64
from collections.abc import Collection, Iterable

DIGEST_BYTES = 6
"""Bytes kept of an image's SHA-256: among a million images, that of another one is there with a chance of 4e-9."""


def shortened(digest: bytes) -> bytes:
    """Return what is kept of an image's SHA-256."""
    return digest[:DIGEST_BYTES]


def pack(digests: Iterable[bytes]) -> str:
    """Return short digests as text, sorted, each once: 8 characters an image, which say nothing of order or names."""
    return base64.b64encode(b"".join(sorted(set(digests)))).decode("ascii")


def unpack(text: str) -> Collection[bytes]:
    """Return the digests in the output of `pack`.

    Raises:
        ValueError: it is none.
    """
    packed = base64.b64decode(text, validate=True)
    if len(packed) % DIGEST_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of digests")
    return frozenset(packed[begin : begin + DIGEST_BYTES] for begin in range(0, len(packed), DIGEST_BYTES))
