"""A real `mlflow server` that can be killed, stopped and started again, and a proxy that makes it slow or rude."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

UP_WITHIN = 120.0


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(address: str, process: "subprocess.Popen[bytes]") -> None:
    """Until a server that was just started answers there."""
    deadline = time.monotonic() + UP_WITHIN
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except urllib.error.HTTPError:  # it is up, and wants a password
            return
        except OSError:
            assert process.poll() is None, f"{process.args} ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"{address} did not come up"
            time.sleep(0.2)


class Server:
    """`mlflow server` on a free port of this machine, by default with SQLite and an artifact folder.

    Args:
        store: where it keeps runs.
        artifacts: its options for artifacts.
        options: more of its options.
        env: more of its environment.
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
        self._words = (
            *("--backend-store-uri", store or f"sqlite:///{folder}/server.db", "--workers", "1"),
            *(artifacts or ("--artifacts-destination", str(folder / "artifacts"))),
            *options,
        )
        self._env = dict(env or {})
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                    *self._words,
                ],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._env},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until_up(f"{self.uri}/health", self.process)

    def kill(self) -> None:
        """End it at once, with its workers."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def send(self, signum: int) -> None:
        """Send a signal to it and its workers: SIGSTOP makes it hang, SIGCONT go on."""
        os.killpg(self.process.pid, signum)


class Proxy:
    """Stands before a server. `mode` says what it does with a request: `pass`, `slow`, or a status such as `503`."""

    def __init__(self, server: Server) -> None:
        self.mode = "pass"
        self.refused = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.mode == "slow":
                    time.sleep(1.0)
                elif proxy.mode != "pass":
                    proxy.refused += 1
                    self.send_response(int(proxy.mode))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                try:
                    self.forward(connection, body)
                except (OSError, http.client.HTTPException):  # one of the two has gone
                    self.close_connection = True
                finally:
                    connection.close()

            def forward(self, connection: http.client.HTTPConnection, body: bytes) -> None:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Let the port go."""
        self._http.shutdown()
        self._http.server_close()
