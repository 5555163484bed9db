"""Networks that other packages register, by their entry points in the group `shufflenet_mlflow.models`.

The name of an entry point is the network's; one that ends in `/` stands for all names that begin with it. Only metadata
is read here: no such package is imported before one of its networks is built, and torch is not either.
"""

import re
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar

from shufflenet_mlflow.errors import ModelError

GROUP = "shufflenet_mlflow.models"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*/?")


@dataclass(frozen=True)
class Registration:
    """An entry point of the group."""

    family: ClassVar[str] = "registered"
    name: str
    """The network's name; ends in `/` if it stands for all names that begin with it."""
    package: str
    """Name and version of the package that registers it."""
    entry: EntryPoint = field(repr=False)

    @property
    def is_prefix(self) -> bool:
        """Whether it stands for all names that begin with its own."""
        return self.name.endswith("/")

    def matches(self, name: str) -> bool:
        """Whether it stands for the network `name`."""
        return name == self.name or (self.is_prefix and name.startswith(self.name))

    def __str__(self) -> str:
        return f"the entry point {self.name!r} ({self.entry.value}) of {self.package}"


def registrations() -> list[Registration]:
    """Return all entry points of the group, also those that cannot be used, by name."""
    found = [Registration(entry.name, _package_of(entry), entry) for entry in entry_points(group=GROUP)]
    return sorted(found, key=lambda registration: (registration.name, registration.package))


def _package_of(entry: EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def is_name(name: str) -> bool:
    """Whether a network, or a prefix of networks, can be called so."""
    return _NAME.fullmatch(name) is not None


def find_registration(name: str) -> Registration | None:
    """Return the entry point of the network `name`, the one with the longest name; None if there is none.

    Raises:
        ModelError: several packages register it.
    """
    if not is_name(name) or name.endswith("/"):
        return None
    matching = [registration for registration in registrations() if registration.matches(name)]
    longest = max((len(registration.name) for registration in matching), default=0)
    nearest = [registration for registration in matching if len(registration.name) == longest]
    if len(nearest) > 1:
        packages = " and ".join(registration.package for registration in nearest)
        raise ModelError(
            f"the network {name!r} is registered by {packages}; uninstall all but one", code="model-registered-twice"
        )
    return nearest[0] if nearest else None
