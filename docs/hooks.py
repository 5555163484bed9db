"""What the site needs beyond `mkdocs.yml`: the pages that lie beside `docs/`, for GitHub, and links between both."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ABOVE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""A page beside `docs/` -> what it is called on the site."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_CONSOLE = re.compile(r"^(\s*)```console$", re.MULTILINE)
_PICTURE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Files, config: Any) -> Files:
    """Take in the pages from above, with links as they are from within `docs/`."""
    root = Path(config.config_file_path).parent
    for name, page in ABOVE.items():
        content = _LINK.sub(lambda link: f"[{link[1]}]({_from_above(link[2])})", (root / name).read_text())
        files.append(File.generated(config, page, content=_PICTURE.sub(r"\1", content)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, **_: Any) -> str:
    """Links of other pages to those above; the site has no pages for folders, so links to these are plain text.

    Console blocks hold commands without prompts, which are coloured as what they are: bash.
    """
    folder = Path(config.docs_dir) / PurePosixPath(page.file.src_uri).parent

    def mend(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path, mark, anchor = target.partition("#")
        if path and (folder / path).is_dir():
            return text
        if path.startswith("../"):
            return f"[{text}]({ABOVE.get(path.removeprefix('../'), path)}{mark}{anchor})"
        return link[0]

    return _LINK.sub(mend, _CONSOLE.sub(r"\1```bash", markdown))


def _from_above(target: str) -> str:
    path, mark, anchor = target.partition("#")
    return ABOVE.get(path, path.removeprefix("docs/")) + mark + anchor
