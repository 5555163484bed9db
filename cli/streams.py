"""Standard output and standard error that can fail: a pipe nobody reads, a terminal that is gone, a full disk."""

import io
import os
import sys
from typing import Any


class OutputError(Exception):
    """Standard output cannot be written to. It is no OSError, which click ends the command for, silently.

    Args:
        error: says why.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.errno, self.strerror = error.errno, error.strerror


class _Unfailing(io.FileIO):
    """Standard error: once it cannot be written to, what is written is dropped, since no work depends on it."""

    _gone = False

    def write(self, data: Any) -> int:
        if not self._gone:
            try:
                return super().write(data) or len(data)  # None: it would have to wait, and is left out
            except OSError:
                self._gone = True
        return len(data)


class _Failing(io.FileIO):
    """Standard output: raises OutputError once, and drops what follows, such as what was still in a buffer."""

    _gone = False

    def write(self, data: Any) -> int:
        if not self._gone:
            try:
                return super().write(data)
            except BlockingIOError:
                raise
            except OSError as error:
                self._gone = True
                raise OutputError(error) from error
        return len(data)


def guard() -> None:
    """Let both streams of this process fail as described, also for libraries that write to them."""
    for number in (0, 1, 2):  # a closed one's number would go to the next file that is opened, such as a database
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has None for a stream that was closed when it started.
    sys.stdout = _guarded(sys.stdout or open(os.devnull, "w"), _Failing)  # noqa: SIM115 - for the whole process
    sys.stderr = _guarded(sys.stderr or open(os.devnull, "w"), _Unfailing)  # noqa: SIM115


def _guarded(stream: Any, kind: type[io.FileIO]) -> Any:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = kind(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
