"""One image-decoding process: tasks in by socket, pixels out by shared memory.

Reads the encoded bytes from the spool by path and offset and writes RGB rows to where the task
says. Started by `decode_pool` as a fresh interpreter. Knows no row and no order. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import EngineError, RowError
from pipeline.images import decode_image

READY = -1  # the number of the first message: the process can take tasks
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the parent decides


class Task(NamedTuple):
    """Decode `num_bytes` at `offset` of `path` into `memory` at `place` as [height, width, 3]."""

    number: int
    path: str
    offset: int
    num_bytes: int
    digest: str  # of the bytes, in hexadecimal
    width: int  # as decoded
    height: int
    out_width: int  # resized to this if it differs
    out_height: int
    memory: str
    memory_size: int
    place: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.out_height, self.out_width, 3

    @property
    def out_bytes(self) -> int:
        return 3 * self.out_width * self.out_height


def pixels_of(task: Task, max_pixels: int) -> Image.Image:
    """The task's image, resized as the official processors call Pillow."""
    image = decode_image(_spooled(task), max_pixels)
    if image.size != (task.width, task.height):
        raise RowError("corrupt_image", "The image's size differs from its header's.")
    size = task.out_width, task.out_height
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def main(connection: int, max_pixels: int, arena: str) -> None:
    """Serve tasks until the socket closes; `arena` is the memory that lives as long."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    link = socket.socket(fileno=connection)
    memories = _Memories(arena)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), link.makefile("rb") as lines:
        _say(link, [READY, None, None])
        _silence()
        for line in lines:
            task = Task(*json.loads(line))
            _say(link, [task.number, *_serve(task, memories, max_pixels)])


def _serve(task: Task, memories: _Memories, max_pixels: int) -> tuple[str | None, str | None]:
    """(error code, message); the code `engine` is no row's fault."""
    try:
        image = pixels_of(task, max_pixels)
        memories.write(task, np.asarray(image))
    except RowError as error:
        return error.code, str(error)
    except EngineError as error:
        return "engine", str(error)
    except MemoryError:
        return "image_too_large", "The image does not fit the memory."
    return None, None


def _spooled(task: Task) -> bytes:
    try:
        file = os.open(task.path, os.O_RDONLY)
        try:
            data = os.pread(file, task.num_bytes, task.offset)
        finally:
            os.close(file)
    except OSError as error:
        raise EngineError(f"the spool cannot be read: {error}") from error
    if blake2b(data, digest_size=16).hexdigest() != task.digest:
        # NOTE: 0.2 ms a picture, and a forgotten spool's path may lead to another file by now.
        raise EngineError("the spool does not hold the image any more")
    return data


class _Memories:
    """Shared memory by path; the arena stays mapped, larger blocks come and go."""

    def __init__(self, arena: str) -> None:
        self._path = arena
        self._arena: mmap.mmap | None = None

    def write(self, task: Task, pixels: np.ndarray) -> None:
        if task.memory != self._path:
            with _map(task) as memory:
                _write(memory, task, pixels)
            return
        if self._arena is None:
            self._arena = _map(task)
        _write(self._arena, task, pixels)


def _write(memory: mmap.mmap, task: Task, pixels: np.ndarray) -> None:
    np.copyto(np.ndarray(task.shape, np.uint8, memory, task.place), pixels)


def _map(task: Task) -> mmap.mmap:
    try:
        file = os.open(task.memory, os.O_RDWR)
        try:
            return mmap.mmap(file, task.memory_size)
        finally:
            os.close(file)
    except OSError as error:
        raise EngineError(f"the shared memory cannot be mapped: {error}") from error


def _say(link: socket.socket, message: list[object]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def _silence() -> None:
    """What decoding libraries print is said better by error codes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
