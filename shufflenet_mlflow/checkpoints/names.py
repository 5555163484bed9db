"""Names of checkpoint files: `{tag}checkpoint-{iters:06}.pth.tar`, as in the original release."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from shufflenet_mlflow.errors import ConfigError

FINAL_TAG = "bnps-"
"""Marks the state after BN re-estimation, the last one of a run."""

_NAME = re.compile(r"(?P<tag>.*?)checkpoint-(?P<iters>\d+)\.pth\.tar", re.DOTALL)
_TAG = re.compile(r"[\w.+-]*")


class CheckpointName(NamedTuple):
    """The parts of a checkpoint file's name."""

    iters: int
    tag: str


def checkpoint_name(iters: int, tag: str = "") -> str:
    """Return the file name of the checkpoint after `iters` iterations.

    Raises:
        ConfigError: `iters` is not a non-negative integer, or `tag` holds characters that a file name should not.
    """
    if not isinstance(iters, int) or iters < 0:
        raise ConfigError(f"iters (={iters}) must be an integer, and not negative", code="iters-invalid")
    if not _TAG.fullmatch(tag) or tag.startswith("."):
        raise ConfigError(
            f"the tag {tag!r} may hold letters, digits and '_', '-', '+', '.', and not begin with '.'",
            code="tag-invalid",
        )
    return f"{tag}checkpoint-{iters:06}.pth.tar"


def parse_name(name: str) -> CheckpointName | None:
    """Return the parts of a checkpoint's file name, or None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None or name.startswith("."):
        return None
    return CheckpointName(int(match["iters"]), match["tag"])


def short_name(name: str) -> str:
    """Return the distinctive part of a checkpoint's name, such as `bnps-000012`."""
    return name.removesuffix(".pth.tar").replace("checkpoint-", "")


def newest_first(names: Iterable[str]) -> list[str]:
    """Return the names of checkpoints among `names`, newest first.

    Of several at one iteration, the one after BN re-estimation comes first and the untagged one last.
    """

    def order(name: str) -> tuple[int, bool, str]:
        iters, tag = parsed[name]
        return iters, tag == FINAL_TAG, tag

    parsed = {name: parts for name in names if (parts := parse_name(name)) is not None}
    return sorted(parsed, key=order, reverse=True)
