"""A run's description in the UI: one paragraph is ours, and what people write around it is kept."""

import re
from dataclasses import dataclass
from typing import ClassVar

from shufflenet_mlflow.tracking.names import NOTE_TAG
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import RunTarget

_BEGIN, _END = "<!-- shufflenet -->", "<!-- /shufflenet -->"
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

LONGEST_NOTE = 4500
"""Characters; MLflow accepts 5000 in a tag."""


@dataclass(frozen=True)
class Note:
    """Markdown that replaces the note sent before."""

    kind: ClassVar[str] = "note"
    text: str

    @classmethod
    def of(cls, *paragraphs: str) -> "Note":
        """Make a note of Markdown paragraphs, without credentials."""
        return cls(redact("\n\n".join(paragraphs)))

    def send(self, target: RunTarget) -> None:
        """Replace our paragraph, or append it to a description without one."""
        before = target.read().data.tags.get(NOTE_TAG, "")
        own = f"{_BEGIN}\n{self.text[:LONGEST_NOTE]}\n{_END}"
        note = _OURS.sub(lambda _: own, before) if _OURS.search(before) else f"{before}\n\n{own}".strip()
        if note != before:
            target.set_tag(NOTE_TAG, note)


def indented(text: str) -> str:
    """Return text as an indented code block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
