"""A thread that looks at something now and then."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watching(look: Callable[[], bool], *, seconds: float, name: str) -> Iterator[None]:
    """Within the block, call `look` every `seconds` in a thread of this name, until it returns True.

    `look` may not raise.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            if look():
                return

    watcher = threading.Thread(target=watch, name=name, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
