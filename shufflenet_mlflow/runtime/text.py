"""Text in messages."""

import unicodedata
from collections.abc import Callable, Sequence

_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories: controls, formatting such as bidirectional overrides, lone surrogates, separators of lines."""

FILE_NAME_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))
"""The bytes of a file name that is not UTF-8, as Python holds them."""


def visible(text: str, *, keep: str = "") -> str:
    """Return text for people: what would control a terminal, reorder or hide it becomes an escape such as `\\x1b`.

    Args:
        keep: characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in keep and unicodedata.category(letter) in _INVISIBLE
        else letter
        for letter in text
    )


def name_some(names: Sequence[str], most: int = 3, *, shown_as: Callable[[str], str] = str) -> str:
    """Return the first `most` names, each as `shown_as` shows it, and how many more there are."""
    shown = ", ".join(map(shown_as, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as "1 file" and "12,000 files".

    Args:
        plural: of the noun, where it takes more than an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
