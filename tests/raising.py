"""Every place in the code that makes an error for a user, found by reading the code; and which of them were reached."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
import pytest

import shufflenet_mlflow
import shufflenet_mlflow.cli
from shufflenet_mlflow import errors
from shufflenet_mlflow.errors import ShuffleNetError

PACKAGE = Path(shufflenet_mlflow.__file__).parent
CLI = Path(shufflenet_mlflow.cli.__file__).parent
MAKERS = {
    *(name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, ShuffleNetError)),
    *("BadParameter", "UsageError", "ClickException", "fail"),
    "_require",  # of config.py: a rule for an option
}
"""What a call of it makes an error."""
WORDS = 7
"""Of its message, that tell a place from others in the same function."""


@dataclass(frozen=True)
class Site:
    """A call that makes an error."""

    path: Path
    first: int
    last: int
    key: str
    """`module.function: the message's first words`, with {} where a value stands."""


def find_sites() -> dict[str, Site]:
    """Every site of the package, by its key."""
    found: dict[str, Site] = {}
    for prefix, folder in (("", PACKAGE), ("cli.", CLI)):
        for path in sorted(folder.rglob("*.py")):
            if prefix or CLI not in (path.parent, path.parent.resolve()):  # the command line may lie in the package
                module = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
                for site in _sites_in(path, module.removesuffix(".__init__")):
                    key, number = site.key, 2
                    while key in found:
                        key, number = f"{site.key} #{number}", number + 1
                    found[key] = Site(site.path, site.first, site.last, key)
    return found


def _sites_in(path: Path, module: str) -> Iterator[Site]:
    def visit(node: ast.AST, inside: str) -> Iterator[Site]:
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{inside}.{child.name}"
            elif isinstance(child, ast.Call) and _makes_error(child, node) and not inside.endswith("._require"):
                key = f"{inside}: {_first_words(child)}"
                yield Site(path.resolve(), child.lineno, child.end_lineno or child.lineno, key)
            yield from visit(child, name)

    yield from visit(ast.parse(path.read_text("utf-8")), module)


def _makes_error(call: ast.Call, parent: ast.AST) -> bool:
    if not isinstance(
        call.func, (ast.Name, ast.Attribute)
    ):  # raise type(error)(...), raise (This if so else That)(...)
        return isinstance(parent, ast.Raise)
    name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
    return name in MAKERS


def _first_words(call: ast.Call) -> str:
    if isinstance(call.func, ast.Name) and call.func.id == "_require":
        named = call.args[1]
        return str(named.value) if isinstance(named, ast.Constant) else f"{{{ast.unparse(named)}}}"
    for argument in call.args:
        for node in ast.walk(argument):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
                return " ".join("".join(parts).split()[:WORDS])
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                return " ".join(node.value.split()[:WORDS])
    return ", ".join(map(ast.unparse, call.args))


@dataclass
class Recorder:
    """Which sites have made an error whose message a user got to see."""

    sites: dict[str, Site]
    made: list[tuple[str, str]] = field(default_factory=list)
    """Site and message, since the last call of `shown`."""
    reached: dict[str, str] = field(default_factory=dict)
    """Site -> the first entry of the list that reached it."""
    tried: set[object] = field(default_factory=set)
    """Entries of the list."""

    def note(self, frame: FrameType | None, message: str) -> None:
        """An error was made by whoever is below `frame`."""
        while frame is not None:
            if keys := self._at(frame.f_code.co_filename, frame.f_lineno):
                self.made += [(key, message) for key in keys]
                return
            frame = frame.f_back

    def _at(self, name: str, line: int) -> list[str]:
        """The narrowest site around the line; several where a line has several."""
        around = [site for site in self.sites.values() if site.first <= line <= site.last and _same(site.path, name)]
        narrowest = min((site.last - site.first for site in around), default=0)
        return [site.key for site in around if site.last - site.first == narrowest]

    def shown(self, what: str, text: str) -> None:
        """The entry `what` has shown `text`: an error that was caught on the way there does not count."""
        for key, message in self.made:
            if _plain(message) in _plain(text):
                self.reached.setdefault(key, what)
        self.made.clear()


_RESOLVED: dict[str, Path] = {}


def _same(path: Path, name: str) -> bool:
    if name not in _RESOLVED:
        _RESOLVED[name] = Path(name).resolve()
    return _RESOLVED[name] == path


def _plain(text: str) -> str:
    """Without blanks and what cannot be printed, since the command line changes those."""
    from shufflenet_mlflow.tracking.redaction import redact

    return "".join(
        letter for letter in redact(text) if letter.isprintable() and letter not in " \N{REPLACEMENT CHARACTER}"
    )


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    """Notes every error that is made while it is there."""
    recorder = Recorder(find_sites())

    def noting(owner: type, original: Any) -> None:
        def init(self: Any, message: str = "", *rest: Any, **named: Any) -> None:
            original(self, message, *rest, **named)
            recorder.note(sys._getframe(1), str(message))

        patch.setattr(owner, "__init__", init)

    with pytest.MonkeyPatch.context() as patch:
        noting(ShuffleNetError, ShuffleNetError.__init__)
        noting(click.ClickException, click.ClickException.__init__)
        yield recorder
