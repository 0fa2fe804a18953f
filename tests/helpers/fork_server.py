"""`vlm-batch` processes by the hundred: forked from one that has its imports done.

As a program (`python fork_server.py SOCKET`) it forks a process for every request that comes over
a Unix socket; `start` is the other side. Each is a process of its own, to be signalled and killed
like any; only the imports are shared.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = ("jobs.cli", "jobs.runner", "jobs.verify", "jobs.status", "jobs.storage_local",
           "jobs.commands.run", "jobs.commands.verify", "jobs.commands.status",
           "pipeline.sources.parquet", "tests.helpers.fake_labeller", "pandas")  # fmt: skip


class ForkedProcess:
    """The part of `subprocess.Popen` that tests need; output goes through files."""

    def __init__(self, args: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.args = tuple(args)
        self.returncode: int | None = None
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        request = {"args": self.args, "cwd": str(cwd), "env": dict(env)}
        data = json.dumps(request).encode()
        fds = [self._out.fileno(), self._err.fileno()]
        socket.send_fds(self._connection, [len(data).to_bytes(4, "little")], fds)
        self._connection.sendall(data)
        self._replies = self._connection.makefile()
        self.pid = int(self._replies.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(None if timeout is None else max(timeout, 1e-3))
            try:
                answer = self._connection.recv(16)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            assert answer, "the fork server has gone"
            self.returncode = os.waitstatus_to_exitcode(int(answer))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return _text(self._out), _text(self._err)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode()
    return text


@cache
def _server() -> str:
    folder = tempfile.mkdtemp(prefix="fork-")
    address = f"{folder}/socket"
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
    )
    until = time.monotonic() + 60
    while not os.path.exists(address):
        assert process.poll() is None, "the fork server did not start"
        assert time.monotonic() < until
        time.sleep(0.02)
    atexit.register(process.kill)
    return address


def _serve(address: str) -> None:
    for name in PRELOAD:
        with contextlib.suppress(ModuleNotFoundError):  # pyarrow loads pandas where there is one
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # sitters need no farewell
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{address}.new")
    server.listen(64)
    os.rename(f"{address}.new", address)
    while True:
        if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
            return  # whoever started this has gone
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            _sit(connection)
        connection.close()


def _sit(connection: socket.socket) -> None:
    """Fork the wanted process, tell its number, and at its end its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, fds, _, _ = socket.recv_fds(connection, 4, 2)
    data = b""
    while len(data) < int.from_bytes(size, "little"):
        data += connection.recv(1 << 16)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(json.loads(data), fds)
    connection.sendall(f"{pid}\n".encode())
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(OSError):
        connection.sendall(str(status).encode())
    os._exit(0)


def _become(request: dict[str, Any], fds: Sequence[int]) -> None:
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for target, fd in enumerate(fds, 1):
        os.dup2(fd, target)
        os.close(fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from jobs.cli import main
    from tests.helpers import disguise

    disguise.put_on()
    sys.exit(main(request["args"]))


if __name__ == "__main__":
    _serve(sys.argv[1])
