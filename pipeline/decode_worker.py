"""One decoding process for images, videos and recordings: tasks by socket, results by memory.

Reads the encoded bytes from the spool by path and offset and writes RGB rows to where the task
says. Started by `decode_pool` as a fresh interpreter. Knows no row and no order. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import socket
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.audio import read_samples
from pipeline.errors import EngineError, RowError
from pipeline.images import Transparency, decode_image
from pipeline.video import Limits, read_frames

READY = -1  # the number of the first message: the process can take tasks
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the parent decides


class Task(NamedTuple):
    """Decode `num_bytes` at `offset` of `path` into `memory` at `place` as `shape`."""

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
    frames: Sequence[int] = ()  # of a video: which of its frames
    timeout_sec: float = 0.0
    num_samples: int = 0  # of a recording
    views: Sequence[Sequence[Any]] = ()  # (height, width, filter) of each frame's pictures
    transparency: Transparency = "white"  # how an image's is read; frames have none

    @property
    def shape(self) -> tuple[int, ...]:
        """[height, width, 3] of an image, with frames before it of a video.

        [frames, pixels, 3] of a video's views.
        [samples, 4] of a recording: the bytes of float32 values.
        """
        if self.num_samples:
            return self.num_samples, 4
        if self.views:
            return len(self.frames), sum(height * width for height, width, _ in self.views), 3
        size = self.out_height, self.out_width, 3
        return (len(self.frames), *size) if self.frames else size

    @property
    def out_bytes(self) -> int:
        return math.prod(self.shape)


def decode_into(out: np.ndarray, task: Task, max_pixels: int) -> None:
    """Write the task's image or frames, resized as the official processors call Pillow.

    Or the task's samples.
    """
    data = _spooled(task)
    if task.num_samples:
        np.copyto(out, read_samples(data, task.num_samples).view(np.uint8).reshape(-1, 4))
        return
    if not task.frames:
        image = decode_image(data, max_pixels, task.transparency)
        np.copyto(out, np.asarray(_sized(image, task)))
        return
    limits = Limits(max_pixels, math.inf, task.timeout_sec)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(task.frames):
        places.setdefault(number, []).append(place)
    for number, pixels in read_frames(data, task.frames, limits):
        frame = _sized(Image.fromarray(pixels), task)
        made = _rendered(frame, task.views) if task.views else np.asarray(frame)
        for place in places[number]:
            np.copyto(out[place], made)


def _rendered(frame: Image.Image, views: Sequence[Sequence[Any]]) -> np.ndarray:
    """The pixels of a frame's views, one after the other."""
    made = [
        np.asarray(frame.resize((width, height), Image.Resampling[filter.upper()]))
        for height, width, filter in views
    ]
    return np.concatenate([pixels.reshape(-1, 3) for pixels in made])


def _sized(image: Image.Image, task: Task) -> Image.Image:
    if image.size != (task.width, task.height):
        if task.frames:
            raise RowError("video_unreadable", "The video's frames change their size.")
        raise RowError("corrupt_image", "The image's size differs from its header's.")
    size = task.out_width, task.out_height
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def main(connection: int, max_pixels: str, arena: str) -> None:
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
            _say(link, [task.number, *_serve(task, memories, int(max_pixels))])


def _serve(task: Task, memories: _Memories, max_pixels: int) -> tuple[str | None, str | None]:
    """(error code, message); the code `engine` is no row's fault."""
    try:
        memories.fill(task, max_pixels)
    except RowError as error:
        return error.code, str(error)
    except EngineError as error:
        return "engine", str(error)
    except MemoryError:
        code = "video_too_large" if task.frames else "image_too_large"
        return code, "The pixels do not fit the memory."
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

    def fill(self, task: Task, max_pixels: int) -> None:
        if task.memory != self._path:
            # NOTE: not closed here, since an error's traceback may still hold an array on it.
            _fill(_map(task), task, max_pixels)
            return
        if self._arena is None:
            self._arena = _map(task)
        _fill(self._arena, task, max_pixels)


def _fill(memory: mmap.mmap, task: Task, max_pixels: int) -> None:
    decode_into(np.ndarray(task.shape, np.uint8, memory, task.place), task, max_pixels)


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
