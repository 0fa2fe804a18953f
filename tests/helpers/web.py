"""A loopback web server whose paths misbehave in the ways that remote images do."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.urls import Client
from tests.helpers.pictures import jpeg

PICTURE = jpeg(32, 24)


class Web:
    """The server's address, and how often each path was asked for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: Counter[str] = Counter()

    def url(self, path: str, host: str = "good.test") -> str:
        return f"http://{host}:{self.port}{path}"

    def client(self, **hosts: str) -> Client:
        """`good.test` is the server, for once a public address; so is each of `hosts`."""
        known = {"good.test": ["127.0.0.1"], "two.test": ["127.0.0.1", "10.0.0.1"]}
        known["private.test"] = ["192.168.1.1"]

        def resolve(host: str, port: int) -> list[str]:
            if host in known:
                return known[host]
            if host == "hang.test":
                time.sleep(5)
            if host.replace(".", "").isdigit() or ":" in host:
                return [host]
            raise OSError("unknown")

        return Client(resolve, lambda address: address == "127.0.0.1")


@contextmanager
def serve_web() -> Iterator[Web]:
    """Serves on the loopback until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    web = Web(server.server_address[1])
    server.web = web  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/").replace("-", "_")
        self.server.web.asked[self.path] += 1
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"_{name}", self._missing)()

    def _answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(data)))
        for name, value in headers.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _missing(self) -> None:
        self._answer(b"gone", 404)

    def _picture(self) -> None:
        self._answer(PICTURE)

    def _a_b(self) -> None:
        self._answer(self.path.encode())

    def _open_end(self) -> None:
        self._answer(PICTURE, Content_Length="")

    def _html(self) -> None:
        self._answer(b"<!DOCTYPE html><html>no picture</html>")

    def _hop(self) -> None:
        self._answer(b"", 302, Location="/picture")

    def _loop(self) -> None:
        self._answer(b"", 301, Location="/loop")

    def _to_private(self) -> None:
        self._answer(b"", 307, Location="http://192.168.1.1/secret.jpg")

    def _to_private_name(self) -> None:
        self._answer(b"", 307, Location="http://private.test/secret.jpg")

    def _to_file(self) -> None:
        self._answer(b"", 302, Location="file:///etc/passwd")

    def _flaky(self) -> None:
        if self.server.web.asked[self.path] < 3:
            self._answer(b"", 503)
        else:
            self._answer(PICTURE)

    def _busy(self) -> None:
        self._answer(b"", 429)

    def _huge(self) -> None:
        self._answer(b"x", Content_Length=str(200 << 20))

    def _huge_unannounced(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(3200):
            self.wfile.write(bytes(1 << 16))

    def _short(self) -> None:
        self._answer(PICTURE[:100], Content_Length=str(len(PICTURE)))

    def _packed(self) -> None:
        self._answer(PICTURE, Content_Encoding="gzip")

    def _silent(self) -> None:
        time.sleep(5)

    def _drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def _drip_header(self) -> None:
        for _ in range(100):
            self.wfile.write(b"H")
            self.wfile.flush()
            time.sleep(0.05)

    def _endless_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * (1 << 20))
