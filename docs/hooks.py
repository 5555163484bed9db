"""Site hooks: add the pages beside `docs/`, which GitHub shows, and rewrite the links between both."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ABOVE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Page beside `docs/` -> its name on the site."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_CONSOLE = re.compile(r"^(\s*)```console$", re.MULTILINE)
_PICTURE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the parent folder, with links rewritten as if they were in `docs/`."""
    root = Path(config.config_file_path).parent
    for name, page in ABOVE.items():
        content = _LINK.sub(lambda link: f"[{link[1]}]({_from_above(link[2])})", (root / name).read_text())
        files.append(File.generated(config, page, content=_PICTURE.sub(r"\1", content)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, **_: Any) -> str:
    """Rewrite links to the pages from the parent folder; links to folders, which have no page, become plain text.

    Console blocks hold commands without prompts, so they are highlighted as bash.
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
