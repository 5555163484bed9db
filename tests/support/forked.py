"""Work in a forked child, which starts in milliseconds because its parent has imported everything."""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

Report = Callable[[str], None]
"""Send a line to the parent."""


@dataclass
class Child:
    """A forked process, and the pipe from which its reports are read."""

    pid: int
    pipe: int

    def wait(self) -> tuple[int, list[str]]:
        """Return its status, as `os.waitpid` has it, and the lines that it reported."""
        chunks = []
        while chunk := os.read(self.pipe, 65536):
            chunks.append(chunk)
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        return status, b"".join(chunks).decode().splitlines()

    def expect_success(self) -> list[str]:
        """Return the lines that it reported, or fail with them if its status is not 0."""
        status, lines = self.wait()
        assert status == 0, "\n".join(lines)
        return lines

    def kill_after(self, seconds: float) -> None:
        """Kill it from outside, at an instant that nobody chose."""
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def fork(work: Callable[[Report], None]) -> Child:
    """Run `work(report)` in a child; its status is 1 if that raises, and the last lines are the traceback then."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    status = 1
    write = os.write  # tests replace it
    try:
        os.close(reading)

        def report(text: str) -> None:
            write(writing, text.encode() + b"\n")

        try:
            work(report)
            status = 0
        except Exception:  # noqa: BLE001 - the parent shows it
            report(traceback.format_exc())
    finally:
        os._exit(status)
