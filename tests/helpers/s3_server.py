"""An S3 server on loopback (moto) that can be told to fail: refuse, lose a reply, cut or stall one.

Runs in a thread of the test process; `faults` are used up one by one, in order.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>injected</Message></Error>"""
STALL_SEC = 2.0
STATUS = {
    "SlowDown": "503 Slow Down",
    "InternalError": "500 Internal Server Error",
    "ServiceUnavailable": "503 Service Unavailable",
    "TooManyRequests": "429 Too Many Requests",
    "ConditionalRequestConflict": "409 Conflict",
    "PreconditionFailed": "412 Precondition Failed",
    "AccessDenied": "403 Forbidden",
}


@dataclass
class Fault:
    """What happens to the next request of a method whose path holds `path`."""

    method: str
    path: str
    kind: str  # an error code of STATUS | lost | cut | stalled
    code: str = "SlowDown"


@dataclass
class S3:
    """A running server."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def fail(self, method: str, path: str, kind: str, times: int = 1) -> None:
        self.faults += [Fault(method, path, kind) for _ in range(times)]

    def count(self, method: str, path: str = "") -> int:
        return sum(r.startswith(method) and path in r for r in self.requests)


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[S3]:
    """A server with one empty bucket."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, lambda env, start: middleware(env, start), threaded=True)
    s3 = S3(f"http://127.0.0.1:{server.server_port}")
    middleware = _middleware(app, s3)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        _request(s3.endpoint, "POST", "/moto-api/reset")
        _request(s3.endpoint, "PUT", f"/{bucket}")
        s3.requests.clear()
        yield s3
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(s3: S3) -> dict[str, str]:
    """What points s3fs and botocore to the server."""
    return {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_MAX_ATTEMPTS": "1",  # botocore's own retries only slow the tests down
        "AWS_EC2_METADATA_DISABLED": "true",
        "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": STALL_SEC / 2}}),
    }


def _middleware(app: Any, s3: S3) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    lock = threading.Lock()

    def call(env: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = f"{env['REQUEST_METHOD']} {env['PATH_INFO']}?{env.get('QUERY_STRING', '')}"
        with lock:
            s3.requests.append(request)
            fault = _take(s3, env["REQUEST_METHOD"], request)
        if fault is None:
            return app(env, start)  # type: ignore[no-any-return]
        if fault.kind in STATUS:
            env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0))
            return _error(start, fault.kind)
        captured: list[Any] = []

        def note(*args: Any) -> None:
            captured.extend(args)

        body = b"".join(app(env, note))
        if fault.kind == "lost":  # done, but the client hears of a failure
            return _error(start, fault.code)
        start(*captured)
        half = len(body) // 2
        if fault.kind == "stalled":
            return _stalled(body[:half], body[half:])
        return [body[:half]]  # Content-Length says more

    return call


def _stalled(first: bytes, rest: bytes) -> Iterator[bytes]:
    yield first
    time.sleep(STALL_SEC)
    yield rest


def _take(s3: S3, method: str, request: str) -> Fault | None:
    for fault in s3.faults:
        if fault.method == method and fault.path in request:
            s3.faults.remove(fault)
            return fault
    return None


def _error(start: Any, code: str) -> list[bytes]:
    body = ERROR.format(code=code).encode()
    start(STATUS[code], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _request(endpoint: str, method: str, path: str) -> None:
    from urllib.request import Request, urlopen

    with urlopen(Request(endpoint + path, method=method), timeout=20) as answer:
        answer.read()
