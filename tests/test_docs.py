"""The documentation's links, commands and tables; `test_long_docs.py` runs its blocks."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
import yaml

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.models.catalog import VARIANTS, Variant
from tests.support.doc_commands import arguments_of, check_arguments, commands
from tests.support.doc_pages import LANGUAGES, PAGES, ROOT, anchors, fences, links
from tests.support.plugins import install

LINKING = [*PAGES, ROOT / "CHANGELOG.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- blocks of code


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_blocks_say_what_they_hold(page: Path) -> None:
    for fence in fences(page):
        assert fence.language in LANGUAGES, fence.where
        if fence.reason is not None:
            assert fence.language in ("console", "python"), f"{fence.where}: is not run in any case"
            assert len(fence.reason.split()) >= 3, f"{fence.where}: why is it not run?"


def console_commands() -> list[Any]:
    return [
        pytest.param(arguments, id=f"{fence.where} {' '.join(arguments)[:60]}")
        for page in PAGES
        for fence in fences(page)
        if fence.language == "console"
        for command in commands(fence.text)
        if (arguments := arguments_of(command)) is not None
    ]


@pytest.mark.parametrize("arguments", console_commands())
def test_commands_and_options_exist(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are not run count, too."""
    if "small" in arguments:  # the network that own-networks.md registers
        install(tmp_path, monkeypatch, {"small": "tiny", "tv/": "from_torchvision"})
    check_arguments(main, arguments)


@pytest.mark.parametrize(
    "line",
    [
        "train --no-such-option",
        "eval",  # its REF lacks
        "export RUN_ID --format png",
        "train --batch-size many",
        "models too",
        "checkpoints mend RUN_ID",
        "trian",
    ],
)
def test_wrong_commands_are_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_arguments(main, line.split())


def test_commands_are_found() -> None:
    text = (
        "# it's a comment\n"
        "shufflenet train --model a \\\n    --lr 0.1  # the run's own\n"
        "A=1 shufflenet eval 'a b' > out.txt && torchrun --nproc-per-node 2 -m shufflenet_mlflow train --job x\n"
        "python -m shufflenet_mlflow models | head\n"
    )
    assert [arguments_of(command) for command in commands(text)] == [
        ["train", "--model", "a", "--lr", "0.1"],
        ["eval", "a b"],
        None,
        ["train", "--job", "x"],
        ["models"],
        None,
    ]


def rows_of(page: str) -> list[list[str]]:
    """Return the cells of a page's tables, without headings."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    return [row for row, line in zip(cells, lines, strict=True) if not line.startswith("| ---")]


def test_what_others_call_it_is_called_so_here() -> None:
    """The right side of the tables names options of ours; Lightning's table has torchrun's beside them."""
    known = {
        option
        for command in walk(main)
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = {option for row in rows_of("docs/coming-from.md") for option in re.findall(r"--[a-z0-9-]+", row[1])}
    assert len(named) > 30
    assert named - known == {"--nproc-per-node"}


def walk(command: click.Command) -> list[click.Command]:
    return [command, *(inner for below in getattr(command, "commands", {}).values() for inner in walk(below))]


def test_each_row_has_a_command_that_shows_it() -> None:
    rows = rows_of("docs/only-here.md")[1:]
    assert len(rows) > 10
    for row in rows:
        [line] = re.findall("`(shufflenet [^`]+)`", row[1])
        arguments = arguments_of(next(commands(line)))
        assert arguments is not None
        check_arguments(main, arguments)
        assert len(row) < 3 or not row[2] or "[" in row[2] or "measured here" in row[2], f"no source: {row[2]}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 700


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_are_not_broken(page: Path) -> None:
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), f"{name_of(page)}:{line}: {target}"
        assert leads_to.is_relative_to(ROOT), f"{name_of(page)}:{line}: {target}"
        if anchor:
            assert anchor in anchors(leads_to), f"{name_of(page)}:{line}: {target} is not among its headings"


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / target).resolve() for page in LINKING for _, target in links(page) if ":" not in target}
    assert {path for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".svg")} <= shown


# ---------------------------------------------------------------- everything is there


def everything() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def leaves(group: click.Group, *above: str) -> list[Any]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += leaves(command, *above, name)
        else:
            found.append(pytest.param([*above, name], command, id=" ".join([*above, name])))
    return found


@pytest.mark.parametrize(("names", "command"), leaves(main))
def test_commands_and_options_are_documented(names: list[str], command: click.Command) -> None:
    text = everything()
    assert " ".join(names) in text
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    missing = [option for option in options if not re.search(rf"{option}(?![\w-])", text)]
    assert not missing


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_networks_are_documented(variant: Variant) -> None:
    """Each has a row with the numbers from the table of variants."""
    millions = (f"{variant.parameters / 1e6:.2f}", f"{variant.macs / 1e6:,.0f}")
    row = [f"`{variant.name}`", *millions, str(variant.top1_error), str(variant.top5_error)]
    assert f"| {' | '.join(row)} |" in (ROOT / "docs" / "networks.md").read_text()


# ---------------------------------------------------------------- the site


class _Loader(yaml.SafeLoader):
    """A YAML loader that ignores mkdocs' own tags, which name functions."""


_Loader.add_multi_constructor("!", lambda *_: None)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def in_nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for item in (entry.values() if isinstance(entry, dict) else entry) for page in in_nav(item)]


def test_every_page_is_in_the_navigation() -> None:
    """`mkdocs build` checks the reverse."""
    nav = in_nav(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages | {"index.md", "contributing.md", "changelog.md"} <= set(nav)
    assert len(nav) == len(set(nav))
