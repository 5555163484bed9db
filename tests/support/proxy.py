"""A proxy in front of a tracking server that makes it slow or makes it answer with an error."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.mlflow_server import Server


class Proxy:
    """Forward requests to a server.

    Its `mode` is `pass`, `slow` (a second for each request) or a status to answer with, such as `503`.
    """

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
                except (OSError, http.client.HTTPException):  # one of the two has closed its end
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
        """Release the port."""
        self._http.shutdown()
        self._http.server_close()
