"""Names of a package that are imported when they are first used: a command waits for what it needs, and for no more."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        homes: name -> the module of the package that has it, as "module", or as "module:name" where it is called
            otherwise there.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, called = homes[name].partition(":")
        value = getattr(import_module(f"{package}.{module}"), called or name)
        setattr(sys.modules[package], name, value)
        return value

    return find
