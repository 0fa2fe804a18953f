"""Records which frames transformers' Qwen video processors take, and what size they give them.

    PYTHONPATH=REPOSITORY python tests/recorded/qwen_video/record.py [FOLDER]

Needs torchvision beside transformers. Writes qwen_video.json: for each size setting, with and
without the cap a frame, the cases of `qwen_video_cases`: number of frames, a digest of their
numbers, height and width (of a clip of two to eight frames).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.helpers import official_video
from tests.parity.qwen_video_cases import SIZES, cases


def digest(frames: list[int]) -> str:
    return hashlib.blake2b(json.dumps(frames).encode(), digest_size=6).hexdigest()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    facts: list[dict[str, Any]] = []
    for newer, settings in SIZES.items():
        for options in settings:
            for capped in (False, True):
                official = official_video.processor(newer, **options)
                official.cap_pixels_per_frame = capped
                found = []
                for number, (info, rule) in enumerate(cases(newer)):
                    frames = official_video.frames(official, info, **rule)
                    count = 2 + number % 7
                    size = official_video.size(official, info, count)
                    found.append([len(frames), digest(frames), *size])
                named = {"newer": newer, "options": options, "capped": capped}
                facts.append({**named, "found": found})
    text = json.dumps(facts, separators=(",", ":"))
    (folder / "qwen_video.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
