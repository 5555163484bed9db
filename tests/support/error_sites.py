"""Every call in the code that makes an error for a user, and a recorder of those that were reached."""

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
from shufflenet_mlflow.runtime.text import visible

PACKAGE = Path(shufflenet_mlflow.__file__).parent
CLI = Path(shufflenet_mlflow.cli.__file__).parent
MAKERS = {
    *(name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, ShuffleNetError)),
    *("BadParameter", "UsageError"),
    "require_that",  # of config/rules.py: a rule for an option
}
"""Names of functions and classes; a call of one makes an error."""


@dataclass(frozen=True)
class Site:
    """A call that makes an error."""

    path: Path
    first: int
    last: int
    key: str
    """The error's code, which no other call has."""


def find_sites() -> dict[str, Site]:
    """Every call of the package that makes an error, by its code."""
    found: dict[str, Site] = {}
    for folder in (PACKAGE, CLI):
        for path in sorted(folder.rglob("*.py")):
            if folder == CLI or CLI not in (path.parent, path.parent.resolve()):  # it may lie in the package
                for site in _sites_in(path):
                    key = site.key
                    if key.startswith("option-"):  # an option can have several rules, all of one code
                        number = sum(known.partition(" ")[0] == key for known in found)
                        key = f"{key} {number + 1}" if number else key
                    assert key not in found, f"{site.path}:{site.first}: the code {key} is taken"
                    found[key] = Site(site.path, site.first, site.last, key)
    return found


def _sites_in(path: Path) -> Iterator[Site]:
    def visit(node: ast.AST, inside: str) -> Iterator[Site]:
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = child.name
            elif isinstance(child, ast.Call) and _makes_error(child, node) and inside != "require_that":
                yield Site(path.resolve(), child.lineno, child.end_lineno or child.lineno, _code_of(child, path))
            yield from visit(child, name)

    yield from visit(ast.parse(path.read_text("utf-8")), "")


def _makes_error(call: ast.Call, parent: ast.AST) -> bool:
    if not isinstance(
        call.func, (ast.Name, ast.Attribute)
    ):  # raise type(error)(...), raise (This if so else That)(...)
        return isinstance(parent, ast.Raise)
    name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
    return name in MAKERS


def _code_of(call: ast.Call, path: Path) -> str:
    if isinstance(call.func, ast.Name) and call.func.id == "require_that":
        field = call.args[1]
        name = str(field.value) if isinstance(field, ast.Constant) else ast.unparse(field)
        return f"option-{name}".replace("_", "-")
    code = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
    if isinstance(code, ast.Attribute):  # another error's, in other words
        return f"{ast.unparse(code)} in {path.stem}"
    assert isinstance(code, ast.Constant), f"{path}:{call.lineno}: an error without a code"
    return str(code.value)


@dataclass
class Recorder:
    """A record of the sites whose error a user got to see."""

    sites: dict[str, Site]
    pending: list[tuple[str, str]] = field(default_factory=list)
    """Site and message, since the last call of `shown`."""
    reached: dict[str, str] = field(default_factory=dict)
    """Site -> the first entry of the list that reached it."""
    tried: set[object] = field(default_factory=set)
    """Entries of the list."""

    def record(self, frame: FrameType | None, message: str) -> None:
        """Record an error that was made below `frame`."""
        while frame is not None:
            if keys := self._at(frame.f_code.co_filename, frame.f_lineno):
                self.pending += [(key, message) for key in keys]
                return
            frame = frame.f_back

    def _at(self, name: str, line: int) -> list[str]:
        """Return the keys of the narrowest site around the line, or of several on one line."""
        around = [site for site in self.sites.values() if site.first <= line <= site.last and _same(site.path, name)]
        narrowest = min((site.last - site.first for site in around), default=0)
        return [site.key for site in around if site.last - site.first == narrowest]

    def shown(self, what: str, text: str) -> None:
        """Record that the entry `what` has shown `text`; errors that were caught on the way do not count."""
        for key, message in self.pending:
            if _plain(message) in _plain(text):
                self.reached.setdefault(key, what)
        self.pending.clear()


_RESOLVED: dict[str, Path] = {}


def _same(path: Path, name: str) -> bool:
    if name not in _RESOLVED:
        _RESOLVED[name] = Path(name).resolve()
    return _RESOLVED[name] == path


def _plain(text: str) -> str:
    """Return the text as the command line prints it, without blanks."""
    from shufflenet_mlflow.tracking.redaction import redact

    return visible("".join(redact(text).split()))


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    """Record every error that is made while a module's tests run."""
    recorder = Recorder(find_sites())

    def record_errors_of(owner: type, original: Any) -> None:
        def init(self: Any, message: str = "", *rest: Any, **named: Any) -> None:
            original(self, message, *rest, **named)
            recorder.record(sys._getframe(1), str(message))

        patch.setattr(owner, "__init__", init)

    with pytest.MonkeyPatch.context() as patch:
        record_errors_of(ShuffleNetError, ShuffleNetError.__init__)
        record_errors_of(click.ClickException, click.ClickException.__init__)
        yield recorder
