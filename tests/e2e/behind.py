"""A reverse proxy that puts a service under a path, as nginx or HAProxy do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

ENDS_AT_THE_PROXY = {"connection", "content-length", "date", "server", "transfer-encoding"}


@contextmanager
def behind(url: str, prefix: str) -> Iterator[str]:
    """Serves `url` under a path such as "/tome" of another port; gives the address of the path.

    The path is removed before a request is forwarded, and told in X-Forwarded-Prefix. Every other path gets 404.
    """

    class Proxy(BaseHTTPRequestHandler):
        def forward(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            response = httpx.request(
                self.command,
                url + self.path.removeprefix(prefix),
                headers={**headers, "x-forwarded-prefix": prefix, "accept-encoding": "identity"},
                content=body,
                timeout=60,
            )
            self.send_response(response.status_code)
            for name, value in response.headers.items():
                if name.lower() not in ENDS_AT_THE_PROXY:
                    self.send_header(name, value)
            self.send_header("content-length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = do_PATCH = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{prefix}"
        finally:
            server.shutdown()
            thread.join()
