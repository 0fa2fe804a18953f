"""Items for the feeder's tests, and the boot code of workers that some pictures bring down."""

from __future__ import annotations

import numpy as np

from pipeline import helper_process
from pipeline.rows import (
    EncodedImage,
    Group,
    ImageLayout,
    PlacedImage,
    Prefix,
    Request,
    RequestKey,
    SamplingParams,
)
from pipeline.spool import Spool
from tests.helpers.pictures import jpeg

DEADLY, SLOW, ONCE = b"deadly", b"slow", b"once:"  # appended to a picture's bytes

FRAGILE_BOOT = helper_process._BOOT.replace(
    "main(",
    """
import os, time
from pipeline import decode_worker
plain = decode_worker.decode_image
def decode_image(data, *rest):
    if data.endswith(b"deadly"):
        os.kill(os.getpid(), 9)
    if data.endswith(b"slow"):
        time.sleep(0.05)
    if b"once:" in data:
        marker = data.split(b"once:")[1].decode()
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), 9)
    if data.endswith(b"stuck"):
        time.sleep(1000)
    return plain(data, *rest)
decode_worker.decode_image = decode_image
main(""",
    1,
)


def placed(spool: Spool, data: bytes, width: int = 64, height: int = 48) -> PlacedImage:
    """The image in the spool, as preparing leaves it."""
    digest, path, offset, num_bytes = spool.add("shard", data)
    image = EncodedImage(digest, width, height, path, offset, num_bytes)
    return PlacedImage(image, ImageLayout(28, 56, (1, 2, 4), 2), 0)


def group(number: int, *images: PlacedImage) -> Group:
    """One request with these images."""
    tokens = np.arange(4, dtype=np.int32)
    positions = np.zeros((3, 4), np.int32)
    key = RequestKey("shard", number, "p")
    return Group((Request(key, tokens, images, positions, 4, SamplingParams()),), 0, 0)


def prefix(*images: PlacedImage) -> Prefix:
    """A prefix with these images."""
    return Prefix(np.arange(4, dtype=np.int32), images, np.zeros((3, 4), np.int32))


def pictures(spool: Spool, count: int, tail: bytes = b"") -> list[Group]:
    """Groups of one 64 x 48 picture each, all different."""
    return [group(n, placed(spool, jpeg(seed=n) + tail)) for n in range(count)]
