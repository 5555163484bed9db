"""Disturbances around a training run: requests that go wrong, a full disk, a locked store, a server that dies."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.mlflow_server import Server
from tests.support.proxy import FAULTS, Proxy

QUIET_SECONDS = (1.0, 8.0)
FAULT_SECONDS = (1.0, 12.0)


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """Mount a file system in memory at `folder`; yield whether that is possible, which takes root on Linux."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = False
    if sys.platform == "linux" and os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill the disk of `folder`, and empty it afterwards."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_database(path: Path) -> Iterator[None]:
    """Hold a lock on a SQLite file, under which nobody else writes."""
    connection = sqlite3.connect(path, timeout=30, isolation_level=None)
    locked = False
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("BEGIN EXCLUSIVE")
        locked = True
    try:
        yield
    finally:
        if locked:
            connection.execute("ROLLBACK")
        connection.close()


class Disturbances:
    """A thread that disturbs a server and a disk at random, one thing after the other, until it is closed.

    Args:
        disk: folder on a small disk of its own, or None where there is none to be filled.
    """

    def __init__(self, server: Server, proxy: Proxy, database: Path, disk: Path | None, seed: int) -> None:
        self._server, self._proxy, self._database, self._disk = server, proxy, database, disk
        self._random = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="disturbances", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        kinds = [*FAULTS, "any", "any", "any", "locked", "killed", "stopped", *(["full"] if self._disk else [])]
        while not self._closed.wait(self._random.uniform(*QUIET_SECONDS)):
            kind = self._random.choice(kinds)
            self.happened[kind] += 1
            self._disturb(kind, self._random.uniform(*FAULT_SECONDS))

    def _disturb(self, kind: str, seconds: float) -> None:
        if kind == "locked":
            with locked_database(self._database):
                self._closed.wait(seconds)
        elif kind == "full":
            assert self._disk is not None
            with full_disk(self._disk):
                self._closed.wait(seconds)
        elif kind == "killed":
            self._server.kill()
            self._closed.wait(seconds)
            self._server.start()
        elif kind == "stopped":
            self._server.send(signal.SIGSTOP)
            self._closed.wait(seconds)
            self._server.send(signal.SIGCONT)
        else:
            self._proxy.choose = self._any_fault if kind == "any" else lambda _method, _path: kind
            self._closed.wait(seconds)
            self._proxy.choose = None

    def _any_fault(self, _method: str, _path: str) -> str:
        """Return a fault for every third request or so."""
        return self._random.choice(["pass", "pass", self._random.choice(FAULTS)])

    def close(self) -> None:
        """End the present disturbance and have no further one."""
        self._closed.set()
        self._thread.join(timeout=150)
        assert not self._thread.is_alive()
        self._proxy.choose = None
        time.sleep(0.5)
