"""A real `mlflow server` that can be killed, suspended and started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.network import free_port, wait_until_up


class Server:
    """`mlflow server` on a free port of this machine, by default with SQLite and an artifact folder.

    Args:
        store: the URI of its backend store.
        artifacts: its options for artifacts.
        options: further options.
        env: further environment variables.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: str | None = None,
        artifacts: Sequence[str] = (),
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._options = (
            *("--backend-store-uri", store or f"sqlite:///{folder}/server.db", "--workers", "1"),
            *(artifacts or ("--artifacts-destination", str(folder / "artifacts"))),
            *options,
        )
        self._env = dict(env or {})
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                    *self._options,
                ],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._env},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until_up(f"{self.uri}/health", self.process)

    def kill(self) -> None:
        """Kill the server and its workers."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def send(self, signum: int) -> None:
        """Send a signal to the server and its workers: SIGSTOP makes it hang, SIGCONT lets it go on."""
        os.killpg(self.process.pid, signum)
