"""Names of checkpoint files: `{tag}checkpoint-{iters:06}.pth.tar`, as in the original release.

A run that is continued from an earlier checkpoint can reach an iteration again, with other bytes. In its artifacts
that file gets a prefix, `{attempt}-{first 12 digits of its SHA-256}~`: no name ever carries other bytes.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from shufflenet_mlflow.errors import ConfigError

FINAL_TAG = "bnps-"
"""Marks the state after BN re-estimation, the last one of a run."""

_PREFIX = re.compile(r"(?P<attempt>[1-9]\d{0,8})-(?P<digest>[0-9a-f]{12})~")
_NAME = re.compile(r"(?P<tag>.*?)checkpoint-(?P<iters>\d{1,300})\.pth\.tar", re.DOTALL)
_PATH_CHARACTERS = frozenset("/\\\0")
_TAG = re.compile(r"[\w.+-]*")
LONGEST_TAG = 100
LARGEST_COUNT = 2**53
"""Beyond it, a float, as in JSON, no longer holds every integer."""


class CheckpointName(NamedTuple):
    """The parts of a checkpoint file's name."""

    iters: int
    tag: str
    attempt: int = 1
    """How often the run had reached the iteration."""


def checkpoint_name(iters: int, tag: str = "") -> str:
    """Return the file name of the checkpoint after `iters` iterations.

    Raises:
        ConfigError: `iters` is not a non-negative integer, or `tag` holds characters that a file name should not.
    """
    if isinstance(iters, bool) or not isinstance(iters, int) or not 0 <= iters <= LARGEST_COUNT:
        raise ConfigError(f"iters (={iters!r}) must be an integer, and not negative", code="iters-invalid")
    if not isinstance(tag, str) or not _TAG.fullmatch(tag) or tag.startswith(".") or len(tag) > LONGEST_TAG:
        raise ConfigError(
            f"the tag {tag!r} may hold up to {LONGEST_TAG} letters, digits and '_', '-', '+', '.', and not begin "
            "with '.'",
            code="tag-invalid",
        )
    return f"{tag}checkpoint-{iters:06}.pth.tar"


def parse_name(name: str) -> CheckpointName | None:
    """Return the parts of a checkpoint's file name, or None for any other name."""
    prefix = _PREFIX.match(name)
    match = _NAME.fullmatch(local_name(name))
    if match is None or name.startswith(".") or not _PATH_CHARACTERS.isdisjoint(name):
        return None
    return CheckpointName(int(match["iters"]), match["tag"], int(prefix["attempt"]) if prefix is not None else 1)


def attempt_name(name: str, attempt: int, sha256: str) -> str:
    """Return the name, among a run's artifacts, of a later attempt at the checkpoint `name`."""
    return f"{attempt}-{sha256[:12]}~{name}"


def attempt_prefix(name: str) -> str:
    """Return what tells an attempt apart, such as `2-0123456789ab~`; empty for a plain name."""
    match = _PREFIX.match(name)
    return match[0] if match is not None else ""


def local_name(name: str) -> str:
    """Return the name on the disk of the checkpoint that is called `name` among a run's artifacts."""
    return name.removeprefix(attempt_prefix(name))


def short_name(name: str) -> str:
    """Return the distinctive part of a checkpoint's name, such as `bnps-000012`."""
    return local_name(name).removesuffix(".pth.tar").replace("checkpoint-", "")


def newest_first(names: Iterable[str]) -> list[str]:
    """Return the names of checkpoints among `names`, newest first.

    Of several at one iteration, the one after BN re-estimation comes first and the untagged one last; of several
    attempts at one, the last attempt comes first.
    """

    def order(name: str) -> tuple[int, bool, str, int]:
        iters, tag, attempt = parsed[name]
        return iters, tag == FINAL_TAG, tag, attempt

    parsed = {name: parts for name in names if (parts := parse_name(name)) is not None}
    return sorted(parsed, key=order, reverse=True)
