"""MLflow's client, and its access to artifacts, as a run's writer uses them: nothing is changed without a lease.

A message takes several requests, and this process may be suspended for hours between two of them.
"""

from collections.abc import Callable
from typing import Any

_READING = ("get_", "search_", "list_", "download_", "load_")


class Guarded:
    """An object whose methods are preceded by a check, except those that only read.

    Args:
        wrapped: MLflow's client, or its access to a run's artifacts.
        check: raises if nothing may be changed any more.
    """

    def __init__(self, wrapped: Any, check: Callable[[], object]) -> None:
        self._wrapped, self._check = wrapped, check

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._wrapped, name)
        if not callable(found) or name.startswith(_READING):
            return found

        def checked(*arguments: Any, **keywords: Any) -> Any:
            self._check()
            return found(*arguments, **keywords)

        return checked
