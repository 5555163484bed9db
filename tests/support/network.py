"""Free ports of this machine, and servers that take a while to answer on them."""

import socket
import subprocess
import time
import urllib.error
import urllib.request

START_SECONDS = 120.0
"""Time that a server may take to start."""


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(address: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a server that was just started answers at `address`."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except urllib.error.HTTPError:  # it answers, and wants a password
            return
        except OSError:
            assert process.poll() is None, f"{process.args!r} ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"{address} did not answer"
            time.sleep(0.2)
