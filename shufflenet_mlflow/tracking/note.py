"""A run's description in the UI, of which one paragraph is ours; what people write around it stays."""

import re
from dataclasses import dataclass
from typing import ClassVar

from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import RunTarget

NOTE_TAG = "mlflow.note.content"

_BEGIN, _END = "<!-- shufflenet -->", "<!-- /shufflenet -->"
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

LONGEST_NOTE = 4500
"""Characters; MLflow takes 5000 of a tag."""


@dataclass(frozen=True)
class Note:
    """Markdown that takes the place of the note sent before."""

    kind: ClassVar[str] = "note"
    text: str

    @classmethod
    def of(cls, *paragraphs: str) -> "Note":
        """Paragraphs of Markdown, without credentials."""
        return cls(redact("\n\n".join(paragraphs)))

    def send(self, target: RunTarget) -> None:
        """Replace ours; a description without one gets it at its end."""
        before = target.read().data.tags.get(NOTE_TAG, "")
        own = f"{_BEGIN}\n{self.text[:LONGEST_NOTE]}\n{_END}"
        note = _OURS.sub(lambda _: own, before) if _OURS.search(before) else f"{before}\n\n{own}".strip()
        if note != before:
            target.set_tag(NOTE_TAG, note)


def indented(text: str) -> str:
    """As a block of code."""
    return "\n".join(f"    {line}" for line in text.splitlines())
