"""A stand-in for the Hugging Face hub on the loopback: serves <root>/datasets/<owner>/<name>/….

Only what `datasets` and `HfFileSystem` ask when they read. Set HF_ENDPOINT to `url` before the
client is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40
_REPO = r"([^/]+/[^/]+)"


@contextmanager
def serve_hub(root: Path, commit: str = COMMIT) -> Iterator[str]:
    """Serves the folder; yields the endpoint's address."""
    handler = type("Handler", (_Handler,), {"root": root, "commit": commit})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    commit: str

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if match := re.fullmatch(rf"/api/datasets/{_REPO}(?:/revision/[^/]+)?", path):
            self._info(match[1])
        elif match := re.fullmatch(rf"/api/datasets/{_REPO}/tree/[^/]+(?:/(.*))?", path):
            self._tree(match[1], match[2] or "", query.get("recursive", ["0"])[0].lower())
        elif match := re.fullmatch(rf"/datasets/{_REPO}/resolve/[^/]+/(.+)", path):
            self._file(self.root / "datasets" / match[1] / match[2])
        else:
            self._missing("EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        match = re.fullmatch(rf"/api/datasets/{_REPO}/paths-info/[^/]+", unquote(self.path))
        if match is None:
            self._missing("EntryNotFound")
            return
        kind = self.headers.get("content-type", "")
        paths = json.loads(body)["paths"] if "json" in kind else parse_qs(body.decode())["paths"]
        folder = self.root / "datasets" / match[1]
        self._json([self._entry(folder, folder / p) for p in paths if (folder / p).exists()])

    def _info(self, name: str) -> None:
        folder = self.root / "datasets" / name
        if not folder.is_dir():
            self._missing("RepoNotFound")
            return
        names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
        info = {"_id": "0", "id": name, "sha": self.commit, "private": False, "gated": False}
        info |= {"disabled": False, "tags": [], "downloads": 0, "likes": 0, "author": "o"}
        stamps = dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z")
        self._json(info | stamps | {"siblings": [{"rfilename": n} for n in names]})

    def _tree(self, name: str, inside: str, recursive: str) -> None:
        folder = self.root / "datasets" / name
        if not (folder / inside).is_dir():
            self._missing("EntryNotFound" if folder.is_dir() else "RepoNotFound")
            return
        found = (folder / inside).rglob("*") if recursive in ("1", "true") else None
        entries = sorted(found or (folder / inside).iterdir())
        self._json([self._entry(folder, entry) for entry in entries])

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": self.commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if wanted is None:
            self._send(200, data, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
        self._send(206, data[first : last + 1], headers)

    def _missing(self, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(404, json.dumps({"error": code}).encode(), headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
