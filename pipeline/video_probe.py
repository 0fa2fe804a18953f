"""Measures videos and recordings in a process of its own: a broken one cannot harm the job.

`VideoProber` is this side: it sends the bytes and waits, within a limit, for the answer; `main` is
the other side, with a limit on its memory. Knows no model and no row. Imports no torch.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import threading
import time
from hashlib import blake2b
from typing import Any

from pipeline import audio, helper_process
from pipeline.errors import CODES, EngineError, RowError
from pipeline.rows import VideoInfo
from pipeline.settings import InputSettings
from pipeline.video import Limits, probe

MEMORY_BYTES = 4 << 30  # of the process beyond the bytes of the largest video
START_SEC = 60.0  # patience with a new process, beside the video's own
MAX_CRASHES = 2
KEPT = 4096
_GRACE_SEC = 2.0


def limits_of(settings: InputSettings) -> Limits:
    """The limits that the settings put on a video."""
    return Limits(settings.max_pixels, settings.max_video_sec, settings.video_timeout_sec)


class VideoProber:
    """Measures one video after the other; the process is started with the first."""

    def __init__(self, settings: InputSettings) -> None:
        self._limits = limits_of(settings)
        self._max_audio_sec = settings.max_audio_sec
        largest = max(settings.max_video_bytes, settings.max_audio_bytes)
        self._memory = MEMORY_BYTES + 2 * largest
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._known: dict[bytes, VideoInfo] = {}  # by content: many rows may ask about one video
        self._lock = threading.Lock()

    def probe(self, data: bytes) -> VideoInfo:
        """What the video is. Raises: RowError."""
        digest = blake2b(data, digest_size=16).digest()
        with self._lock:
            known = self._known.get(digest)
            if known is not None:
                return known
            code, answer = self._answer(data)
            if code is not None:
                raise RowError(code, str(answer))
            info = self._known[digest] = VideoInfo(*answer)
            if len(self._known) > KEPT:
                del self._known[next(iter(self._known))]
        return info

    def probe_audio(self, data: bytes) -> int:
        """Samples of a recording at 16 kHz. Raises: RowError."""
        with self._lock:
            code, answer = self._answer(data, self._max_audio_sec)
        if code is not None:
            raise RowError(code.replace("video_timeout", "audio_timeout"), str(answer))
        return int(answer)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end(_GRACE_SEC)

    def _answer(self, data: bytes, audio_sec: float | None = None) -> tuple[str | None, Any]:
        """The process's answer; where the process dies it is asked once more, of a new one."""
        for _ in range(MAX_CRASHES):
            try:
                return self._ask(data, audio_sec)
            except TimeoutError:
                self._end(0)
                return "video_timeout", CODES["video_timeout"]
            except (OSError, ValueError):  # it died
                self._end(0)
        return "worker_crash", "The file brought the process that measures such files down twice."

    def _ask(self, data: bytes, audio_sec: float | None) -> tuple[str | None, Any]:
        link = self._socket or self._start()
        head = {"num_bytes": len(data), "limits": self._limits, "audio_sec": audio_sec}
        link.settimeout(self._limits.timeout_sec + _GRACE_SEC)
        link.sendall(json.dumps(head).encode() + b"\n")
        link.sendall(data)
        code, answer = json.loads(_line(link, self._limits.timeout_sec + _GRACE_SEC))
        return code, answer

    def _start(self) -> socket.socket:
        self._process, link = helper_process.start(
            __name__, str(self._memory), environment={"OMP_NUM_THREADS": "1"}
        )
        self._socket = link
        try:
            _line(link, START_SEC)
        except (OSError, ValueError) as error:
            self._end(0)
            raise EngineError("the process that reads videos does not start") from error
        return link

    def _end(self, patience_sec: float) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            helper_process.end(self._process, patience_sec)
        self._process = self._socket = None


def _line(link: socket.socket, timeout_sec: float) -> bytes:
    """One line of the other side. Raises: TimeoutError, and OSError where there is none."""
    deadline, line = time.monotonic() + timeout_sec, b""
    while not line.endswith(b"\n"):
        link.settimeout(max(0.01, deadline - time.monotonic()))
        part = link.recv(1 << 16)
        if not part:
            raise ConnectionError
        line += part
    return line


def main(connection: int, memory: str) -> None:
    """Serve the other side until its socket closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=connection) as link, link.makefile("rwb") as stream:
        _limit_memory(int(memory))
        stream.write(b"\n")
        stream.flush()
        for line in stream:
            head = json.loads(line)
            data = stream.read(head["num_bytes"])
            told = _answer(data, Limits(*head["limits"]), head["audio_sec"])
            stream.write(json.dumps(told).encode() + b"\n")
            stream.flush()


def _answer(data: bytes, limits: Limits, audio_sec: float | None) -> tuple[str | None, object]:
    try:
        if audio_sec is not None:
            return None, audio.probe(data, audio_sec)
        info = probe(data, limits)
    except RowError as error:
        return error.code, str(error)
    except MemoryError:
        return "video_too_large", "The video does not fit the memory."
    except Exception as error:  # noqa: BLE001 - a stranger's file, and this process goes on
        return "video_unreadable", f"The video cannot be read: {type(error).__name__}."
    return None, (info.width, info.height, info.num_frames, info.fps)


def _limit_memory(num_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(hard, num_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
