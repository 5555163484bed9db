"""The pages of the documentation, parsed: their blocks of code, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent.parent

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

LANGUAGES = {"console", "text", "python", "json", "yaml", "toml", "bash", "csv"}
"""Languages that a block may have; `console` and `python` are run."""

_NOT_RUN = re.compile(r"<!--\s*not run:(.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A block of code.

    Args:
        line: number of its first line in the page, from 1.
        reason: why it is not run; None if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def fences(page: Path) -> list[Fence]:
    """Return the blocks of a page in order; one below the comment `<!-- not run: REASON -->` is not run."""
    found, above = [], ""
    for token in tokens(page):
        if token.type == "fence":
            assert token.map is not None
            match = _NOT_RUN.search(above)
            reason = match.group(1).strip() if match else None
            found.append(Fence(page, token.map[0] + 2, token.info.strip(), token.content, reason))
        above = token.content if token.type == "html_block" else ""
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """Return the targets of links and images, each with the line of its paragraph."""
    found = []
    for token in tokens(page):
        line = token.map[0] + 1 if token.map else 0
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                found.append((line, str(target)))
        if token.type == "html_block":
            found += [(line, target) for target in re.findall(r'(?:href|src)="([^"]+)"', token.content)]
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site form them."""
    found: list[str] = []
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeats = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{repeats}" if repeats else slug)
    return set(found)
