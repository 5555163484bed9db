"""The documentation, taken apart and tried: blocks of code, links, headings; running a page from top to bottom."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from shufflenet_mlflow import create_model

ROOT = Path(__file__).parent.parent

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

LANGUAGES = {"console", "text", "python", "json", "yaml", "toml", "bash", "csv"}
"""What a fence may say that it holds; `console` and `python` are run."""

_NOT_RUN = re.compile(r"<!--\s*not run:(.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A block of code.

    Args:
        line: the first line of what is in it, from 1.
        reason: why it is not run, if the page says that it is not.
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
    """The blocks of a page, in order. One is not run if the comment `<!-- not run: REASON -->` stands above it."""
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
    """Targets of links and images, with the line that each begins near."""
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
    """The names by which headings can be linked to, as GitHub makes them; so does the site."""
    found: list[str] = []
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{again}" if again else slug)
    return set(found)


# ---------------------------------------------------------------- commands


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a console block as words, without comments, assignments before them, and redirections.

    Those with `||` behind them are left out: they are shown because they fail.
    """
    buffer = ""
    for line in text.replace("\\\n", " ").splitlines():
        buffer += line + "\n"
        lexer = shlex.shlex(buffer, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation that goes on
            continue
        buffer = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if command and word != "||":
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)
    assert not buffer, f"a quotation does not end: {buffer}"


def arguments_of(command: list[str]) -> list[str] | None:
    """What a command passes to `shufflenet`; None if it is another one."""
    first = Path(command[0]).name
    if first == "shufflenet":
        return command[1:]
    if first in ("python", "torchrun") and "shufflenet_mlflow" in command:
        return command[command.index("shufflenet_mlflow") + 1 :]
    for script in ("slurm.sh", "torchrun.sh"):  # they pass what they are given on to `shufflenet train`
        for position, word in enumerate(command):
            if word.endswith(f"clusters/{script}"):
                return ["train", *command[position + 1 :]]
    return None


def check_arguments(main: click.Group, arguments: list[str]) -> None:
    """Parse arguments of `shufflenet` as click does, but run no callback: nothing is read, nothing has to exist.

    Raises:
        click.UsageError: no such command or option, a value that it does not take, or an argument too few or too many.
    """
    command: click.Command = main
    context = click.Context(main, info_name="shufflenet")
    while True:
        values, rest, _ = command.make_parser(context).parse_args(list(arguments))
        for parameter in command.params:
            value: Any = values.get(parameter.name or "")
            given = isinstance(value, str | tuple | list) and value != ()  # else None, (), or a mark of click's
            if parameter.required and not given:
                raise click.MissingParameter(ctx=context, param=parameter)
            if given and not isinstance(parameter.type, click.Path | click.File):
                parameter.type_cast_value(context, value)
        if not isinstance(command, click.Group):
            if rest:
                raise click.UsageError(f"{command.name} takes no {' '.join(rest)}", context)
            return
        if not rest:
            return
        name, inner, arguments = command.resolve_command(context, rest)
        assert inner is not None
        context = click.Context(inner, info_name=name, parent=context)
        command = inner


# ---------------------------------------------------------------- running a page


def picture(size: tuple[int, int], brightest: int, rng: np.random.Generator) -> Image.Image:
    pixels = rng.integers(0, 150, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, :, brightest] += 100
    return Image.fromarray(pixels)


def furnish(folder: Path) -> None:
    """What the pages work on, the same each time.

    `pets/train`, `val`, `test` with `cat` and `dog`; `photos`; `imagenet/val` with 1,000 classes;
    `ShuffleNetV2.1.0x.pth.tar` as the original release wrote it.
    """
    rng = np.random.default_rng(0)
    for part, per_class in (("train", 40), ("val", 12), ("test", 12)):
        for label, name in enumerate(("cat", "dog")):
            (folder / "pets" / part / name).mkdir(parents=True)
            for number in range(1, per_class + 1):
                image = picture((44, 36), label, rng)
                image.save(folder / "pets" / part / name / f"{number:04}.jpg")
    (folder / "photos").mkdir()
    for label, name in enumerate(("cat", "dog", "garden")):
        picture((64, 48), label % 2, rng).save(folder / "photos" / f"{name}.jpg")
    for number in range(1000):
        (folder / "imagenet" / "val" / f"n{number:08}").mkdir(parents=True)
        shutil.copy(folder / "photos" / "garden.jpg", folder / "imagenet" / "val" / f"n{number:08}" / "1.jpg")
    torch.manual_seed(0)
    weights = create_model("shufflenet_v2_x1_0").state_dict()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in weights.items()}}, folder / "ShuffleNetV2.1.0x.pth.tar"
    )


PLACEHOLDERS = {"RUN_ID": 0, "OTHER_RUN_ID": 1}
"""Name -> its place among the runs of the folder's store: those with checkpoints, newest first, then those without."""

_RUN_ID = """\
import sqlite3, sys
query = "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active' ORDER BY run_uuid IN \
(SELECT run_uuid FROM tags WHERE key = 'checkpoint.latest') DESC, start_time DESC"
print(sqlite3.connect(sys.argv[1]).execute(query).fetchall()[int(sys.argv[2])][0])"""

_PROLOGUE = """\
set -euo pipefail
if [ -f {state} ]; then . {state}; fi
_run_id() {{ {python} -S -c {code} {database} "$1"; }}
"""

_EPILOGUE = """
{{ declare -px; printf 'cd %q\\n' "$PWD"; }} > {state}
"""


@dataclass
class Terminal:
    """Runs blocks one after the other, as a person does in one terminal: in one folder, exports remain.

    Args:
        folder: where the first block begins.
        scratch: for what is not to lie in the folder.
    """

    folder: Path
    scratch: Path

    def __post_init__(self) -> None:
        self._groups: list[int] = []

    def run(self, fence: Fence, environment: dict[str, str], timeout: float = 900) -> str:
        """Run a block.

        Returns:
            What it printed.

        Raises:
            AssertionError: it failed; the message has page, line, commands and output.
        """
        state = shlex.quote(str(self.scratch / "state"))
        prologue = _PROLOGUE.format(
            state=state,
            python=shlex.quote(sys.executable),
            code=shlex.quote(_RUN_ID),
            database=shlex.quote(str(self.folder / "mlflow.db")),
        )
        # Looked up when the command begins, so that a block may train and then use what it trained.
        names = [name for name in PLACEHOLDERS if re.search(rf"\b{name}\b", fence.text)]
        if fence.language == "python":
            edits = "".join(f' -e "s/\\b{name}\\b/$(_run_id {PLACEHOLDERS[name]})/g"' for name in names)
            body = f"printf %s {shlex.quote(fence.text)} | sed -e '' {edits} | python -"
        else:
            body = fence.text
            for name in names:
                body = re.sub(rf"\b{name}\b", f"$(_run_id {PLACEHOLDERS[name]})", body)
        output = self.scratch / "output"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                ["bash", "-c", prologue + body + _EPILOGUE.format(state=state)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,  # not a pipe: what a block leaves in the background would keep it open
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._groups.append(process.pid)
            try:
                status: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"none after {timeout:.0f} s"
        said = output.read_text(errors="replace")
        assert status == 0, f"{fence.where}: exit status {status}\n\n{fence.text}\n{said}"
        return said

    def close(self) -> None:
        """End what blocks have left in the background."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for group in self._groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, signum)
            time.sleep(0.5 if signum == signal.SIGTERM and self._groups else 0)


def errors_in(text: str, folder: str) -> list[str]:
    """The lines of errors, as they would be in another folder and with another run."""
    lines = [line for line in text.replace(folder, "FOLDER").splitlines() if line.startswith("Error: ")]
    return [re.sub(r"\b[0-9a-f]{32}\b", "ID", line) for line in lines]
