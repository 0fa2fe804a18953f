"""A stand-in for the Hugging Face hub on the loopback: serves <root>/datasets/<owner>/<name>/….

What `datasets`, `HfFileSystem` and `HfApi` ask when they read, and when they make a repository,
upload and commit. Set HF_ENDPOINT to the address before the client is imported, and
HF_HUB_DISABLE_XET=1 before it writes. `faults` are used up one by one, in order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40
_REPO = r"([^/]+/[^/]+)"


@dataclass
class Fault:
    """What happens to the next request of a method whose path holds `path`."""

    method: str
    path: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """A running stand-in."""

    url: str
    root: Path
    commit: str
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def fail(self, method: str, path: str, status: int, times: int = 1, **headers: str) -> None:
        self.faults += [Fault(method, path, status, headers) for _ in range(times)]

    def count(self, method: str, path: str) -> int:
        return sum(r.startswith(method) and path in r for r in self.requests)


@contextmanager
def serve_hub(root: Path, commit: str = COMMIT) -> Iterator[str]:
    """Serves the folder; yields the endpoint's address."""
    with run_hub(root, commit) as hub:
        yield hub.url


@contextmanager
def run_hub(root: Path, commit: str = COMMIT) -> Iterator[Hub]:
    """Serves the folder; yields what can be told to fail."""
    hub = Hub("", root, commit)
    handler = type("Handler", (_Handler,), {"hub": hub, "root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    root: Path

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._fails():
            return
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

    def do_PUT(self) -> None:
        """An upload of one file."""
        if self._fails():
            return
        data, oid = self._body(), self.path.rsplit("/", 1)[-1]
        self.hub.lfs[oid] = data
        self._send(200 if hashlib.sha256(data).hexdigest() == oid else 400, b"", {})

    def do_POST(self) -> None:
        if self._fails():
            return
        body, path = self._body(), unquote(self.path)
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        elif match := re.fullmatch(rf"/api/datasets/{_REPO}/preupload/[^/]+", path):
            self._json({"files": [_upload_mode(f["path"]) for f in json.loads(body)["files"]]})
        elif match := re.fullmatch(rf"/api/datasets/{_REPO}/commit/[^/]+", path):
            self._commit(self.root / "datasets" / match[1], body)
        elif match := re.fullmatch(rf"/api/datasets/{_REPO}/paths-info/[^/]+", path):
            self._paths_info(self.root / "datasets" / match[1], body)
        else:
            self._missing("EntryNotFound")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _fails(self) -> bool:
        self.hub.requests.append(f"{self.command} {self.path}")
        for fault in self.hub.faults:
            if fault.method == self.command and fault.path in self.path:
                self.hub.faults.remove(fault)
                self._body()
                self._send(fault.status, b"{}", fault.headers)
                return True
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        folder = self.root / "datasets" / name
        told = {"url": f"{self.hub.url}/datasets/{name}", "name": name, "id": name}
        if folder.is_dir():
            self._send(409, json.dumps(told | {"error": "exists"}).encode(), {})
            return
        folder.mkdir(parents=True)
        (folder / ".gitattributes").touch()
        self._json(told)

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        found = []
        for asked in objects:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            known = asked["oid"] in self.hub.lfs
            found.append(asked | ({} if known else {"authenticated": True, "actions": action}))
        self._json({"transfer": "basic", "objects": found})

    def _commit(self, folder: Path, body: bytes) -> None:
        records = [json.loads(line) for line in body.splitlines()]
        parent = records[0]["value"].get("parentCommit")
        if parent is not None and parent != self.hub.commit:
            self._send(412, json.dumps({"error": "the branch has moved on"}).encode(), {})
            return
        for record in records:
            value = record["value"]
            if record["key"] == "deletedFile":
                (folder / value["path"]).unlink()
            elif record["key"] in ("file", "lfsFile"):
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                own = record["key"] == "file"
                data = base64.b64decode(value["content"]) if own else self.hub.lfs[value["oid"]]
                path.write_bytes(data)
        self.hub.commit = hashlib.sha1(self.hub.commit.encode()).hexdigest()
        url = f"{self.hub.url}/datasets/x/y/commit/{self.hub.commit}"
        self._json({"success": True, "commitOid": self.hub.commit, "commitUrl": url})

    def _paths_info(self, folder: Path, body: bytes) -> None:
        kind = self.headers.get("content-type", "")
        paths = json.loads(body)["paths"] if "json" in kind else parse_qs(body.decode())["paths"]
        self._json([self._entry(folder, folder / p) for p in paths if (folder / p).exists()])

    def _info(self, name: str) -> None:
        folder = self.root / "datasets" / name
        if not folder.is_dir():
            self._missing("RepoNotFound")
            return
        names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
        info = {"_id": "0", "id": name, "sha": self.hub.commit, "private": False, "gated": False}
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
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": self.hub.commit}
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


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".parquet") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
