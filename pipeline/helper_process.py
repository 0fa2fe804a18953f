"""A fresh interpreter beside this process that runs one function of ours, joined by a socket.

It inherits no thread, no device and no environment of Python's own, and it ends by itself when
this process does, since its socket then closes. Knows nothing of what the two say.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping

_BOOT = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
main = importlib.import_module(sys.argv[2]).main
main(int(sys.argv[3]), *sys.argv[4:])
"""


def start(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Run `module.main(fd of its socket, *arguments)`; returns the process and our socket."""
    ours, theirs = socket.socketpair()
    paths, number = json.dumps(sys.path), str(theirs.fileno())
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, paths, module, number, *arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    return process, ours


def end(process: subprocess.Popen[bytes], patience_sec: float = 0.0) -> None:
    """Wait that long for the process to end by itself, then kill it."""
    try:
        process.wait(patience_sec)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
