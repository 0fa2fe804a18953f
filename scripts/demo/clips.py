"""Short clips of held-out scenes for the videos of the demonstration: `data/clips.parquet`.

A clip shows one scene of `data/scenes.parquet` for three seconds, the camera drifting by a few
pixels, so that its truths stay those of the scene. Needs PyAV's H.264 encoder.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "pipeline" / "demo" / "data"
NUM_CLIPS, NUM_FRAMES, FPS = 16, 24, 8
EDGE = 4  # pixels that the camera drifts


def main() -> None:
    scenes = pq.read_table(DATA / "scenes.parquet").slice(0, 10 * NUM_CLIPS).to_pylist()
    known = [scene for scene in scenes if scene["artist"] != "openmoji"][:NUM_CLIPS]
    ids = [scene["id"].replace("scene", "clip") for scene in known]
    columns: dict[str, list[Any]] = {"id": ids}
    columns["video"] = [
        {"bytes": _clip(scene["image"]["bytes"]), "path": f"{name}.mp4"}
        for name, scene in zip(ids, known, strict=True)
    ]
    for name in ("question", "caption_truth", "answer_truth"):
        columns[name] = [scene[name] for scene in known]
    kinds = {"video": {"_type": "Video"}}
    features = {name: kinds.get(name, {"dtype": "string", "_type": "Value"}) for name in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), DATA / "clips.parquet")


def _clip(picture: bytes) -> bytes:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    wide = np.asarray(image.resize((image.width + EDGE, image.height), Image.Resampling.BICUBIC))
    path = DATA / "clip.mp4"
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = image.width, image.height, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryslow", "threads": "1"}
        for number in range(NUM_FRAMES):
            left = number * EDGE // NUM_FRAMES
            frame = np.ascontiguousarray(wide[:, left : left + image.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.unlink()
    return data


if __name__ == "__main__":
    main()
