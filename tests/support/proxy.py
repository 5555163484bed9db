"""A proxy in front of a tracking server that errs as networks, proxies, portals and overloaded servers do."""

import http.client
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.mlflow_server import Server

FAULTS = (
    *("503", "html-400", "html-502", "json-400", "json-500", "login", "other"),
    *("drop", "lose", "slow", "late", "trickle", "truncate"),
)
"""Every way in which a request can go wrong."""

LATE_SECONDS = 35.0
TRICKLE_SECONDS = 2.0

_PAGE = b"<!DOCTYPE html><html><head><title>%s</title></head><body><h1>%s</h1><p>nginx</p></body></html>\n"
_LOGIN = "/portal/login"


class Proxy:
    """Forward requests to a server, each in the mode of that moment.

    Args:
        server: where requests go.

    Attributes:
        mode: for all requests:

            - `pass`; `slow`, after a second; `late`, answered only after `LATE_SECONDS`;
            - `NNN`, `html-NNN`, `json-NNN`: not forwarded; answered with that status and an empty body, a page, or JSON
              that is not MLflow's;
            - `login`: not forwarded, but redirected to a page with status 200; `other`: answered with status 200 and
              JSON of another server;
            - `drop`: the connection ends before the request is forwarded; `lose`: after that, without an answer;
            - `trickle`: the answer arrives byte by byte, one in `TRICKLE_SECONDS`; `truncate`: half of it arrives.
        choose: if set, returns the mode of one request from its method and path.
        refused: number of requests that were not forwarded.
        modes: number of requests by mode.
    """

    def __init__(self, server: Server) -> None:
        self.mode = "pass"
        self.choose: Callable[[str, str], str] | None = None
        self.refused = 0
        self.modes: Counter[str] = Counter()
        self.server = server
        self._closed = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def mode_of(self, method: str, path: str) -> str:
        """Return the mode of a request, and count it."""
        mode = self.choose(method, path) if self.choose is not None else self.mode
        self.modes[mode] += 1
        return mode

    def pause(self, seconds: float) -> None:
        """Sleep, unless the proxy is closed."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Release the port."""
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_arguments: object) -> None:
        """Print no traceback for a client that has given up."""


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == _LOGIN:
            self._answer(200, _PAGE % (b"Sign in", b"Sign in"), "text/html")
            return
        mode = self.owner.mode_of(self.command, self.path)
        try:
            if not self._refuse(mode):
                self._pass_on(mode, body)
        except (OSError, http.client.HTTPException):  # one of the two has closed its end
            self.close_connection = True

    def _refuse(self, mode: str) -> bool:
        """Answer in the server's place; return whether that is what the mode asks for."""
        form, _, status = mode.rpartition("-")
        if status.isdigit() and form == "json":
            self._answer(int(status), b'{"message": "upstream failure", "request": 17}', "application/json")
        elif status.isdigit():
            title = f"{status} {http.client.responses[int(status)]}".encode()
            self._answer(int(status), _PAGE % (title, title) if form == "html" else b"", "text/html")
        elif mode == "login":
            self._answer(302, b"", "text/html", {"Location": f"{self.owner.uri}{_LOGIN}"})
        elif mode == "other":
            self._answer(200, json.dumps({"status": "ok", "version": 7}).encode(), "application/json")
        elif mode == "drop":
            self._reset()
        else:
            return False
        self.owner.refused += 1
        return True

    def _pass_on(self, mode: str, body: bytes) -> None:
        if mode == "slow":
            self.owner.pause(1.0)
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.server.port, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if mode == "lose":
            self._reset()
            return
        if mode == "late":
            self.owner.pause(LATE_SECONDS)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mode == "truncate":
            self.wfile.write(content[: len(content) // 2])
            self._reset()
        elif mode == "trickle":
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.owner.pause(TRICKLE_SECONDS)
        else:
            self.wfile.write(content)

    def _answer(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        """Close the connection at once, as a crash does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def log_message(self, *_arguments: object) -> None:
        pass
