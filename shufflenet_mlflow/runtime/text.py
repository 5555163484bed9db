"""Text in messages."""

from collections.abc import Callable, Sequence


def name_some(names: Sequence[str], most: int = 3, *, shown_as: Callable[[str], str] = str) -> str:
    """Return the first `most` names, each as `shown_as` shows it, and how many more there are."""
    shown = ", ".join(map(shown_as, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
