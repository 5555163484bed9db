"""How image files are read; every checkpoint states it.

Logged models carry a copy of this module (`export.bundle`). No torch is imported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Reading:
    """How files are read. The defaults are those of new runs.

    Raises:
        ValueError: there is no such way.
    """

    orientation: str = field(default="exif", metadata={"ways": ("exif", "stored")})
    """Turned as EXIF says, or as stored. TIFF and HEIC are turned by what decodes them."""
    transparency: str = field(default="white", metadata={"ways": ("white", "dropped")})
    """Laid over white, or with the colours that the file has where nothing shows."""
    range: str = field(default="type", metadata={"ways": ("type", "clipped")})
    """The range of the file's type becomes 0..255, and numbers without a range are refused; or others are clipped."""
    decoding: str = field(default="scaled", metadata={"ways": ("scaled", "full")})
    """JPEG at 1/2, 1/4 or 1/8 where at least twice the size that is needed remains, or always in full."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, ways = getattr(self, entry.name), entry.metadata["ways"]
            if value not in ways:
                raise ValueError(f"{entry.name} must be {' or '.join(ways)}, not {value!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Reading":
        """Build from a checkpoint's or a logged model's entries; those that are missing mean what 0.1 did.

        Raises:
            ValueError: one is invalid.
        """
        return cls(**{entry.name: values.get(entry.name, entry.metadata["ways"][1]) for entry in fields(cls)})


READING_0_1 = Reading.of({})
"""How version 0.1 read files; also that of published weights, whose figures were measured so."""
