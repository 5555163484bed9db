"""A web server of someone else's, which notes who calls and what they bring."""

import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stranger:
    """Answers every request with the same status, and remembers each one's path and headers."""

    def __init__(self, status: int = 404, headers: Mapping[str, str] | None = None) -> None:
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        stranger, answer_headers = self, dict(headers or {})

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                stranger.paths.append(self.path)
                stranger.authorizations.append(self.headers.get("Authorization"))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                for name, value in answer_headers.items():
                    self.send_header(name, value + self.path if name == "Location" else value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
