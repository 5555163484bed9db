"""Text in messages."""

from collections.abc import Sequence


def name_some(names: Sequence[object], most: int = 3) -> str:
    """Return the first `most` names, separated by commas, and how many more there are."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
