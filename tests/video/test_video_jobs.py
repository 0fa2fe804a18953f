"""Jobs over videos from end to end: the shipped config, every kind of row, batch 1 = N."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.estimate import estimate
from pipeline.labeller import Labeller
from pipeline.rows import Answer, ImageRef, Row, ShardWork
from pipeline.settings import LabelSettings
from tests.helpers.checkpoints import WRITERS
from tests.helpers.videos import sound_only, video

ROOT = Path(__file__).resolve().parents[2]
GOOD = video(30, 10)


def _png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (shade, 9, 99)).save(file, "PNG")
    return file.getvalue()


def _cli(*args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["OUT"] = str(folder / "out")
    command = [sys.executable, "-m", "jobs.cli", *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "out" / "data").to_pylist()


def test_the_shipped_config_answers_the_shipped_clips(tmp_path: Path) -> None:
    done = _cli("run", "configs/video.yaml", "--set", "input.limit=6", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = _rows(tmp_path)
    table = pq.read_table(ROOT / "pipeline/demo/data/clips.parquet").slice(0, 6).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 6
    right = [row["answer"] == clip["answer_truth"] for row, clip in zip(rows, table, strict=True)]
    assert sum(right) >= 5


CELLS: dict[str, tuple[Any, str | None]] = {
    "good": ({"bytes": GOOD, "path": None}, None),
    "by path": ({"bytes": None, "path": "clip.mp4"}, None),
    "gif": ({"bytes": video(12, 6, kind="gif"), "path": "x.gif"}, None),
    "one frame": ({"bytes": video(1), "path": None}, None),
    "null": (None, "missing_video"),
    "empty": ({"bytes": b"", "path": None}, "empty_video"),
    "sound": ({"bytes": sound_only(), "path": None}, "no_video_stream"),
    "noise": ({"bytes": b"no video" * 99, "path": None}, "not_a_video"),
    "cut": ({"bytes": GOOD[:1200], "path": None}, "truncated_video"),
    "nowhere": ({"bytes": None, "path": "none.mp4"}, "missing_file"),
    "remote": ({"bytes": None, "path": "https://example.org/a.mp4"}, "remote_disabled"),
    "long": ({"bytes": video(60, 5), "path": None}, "video_too_long"),
    "wide": ({"bytes": video(3, width=640, height=480), "path": None}, "video_too_large"),
}


def test_every_row_of_a_job_ends_in_its_state(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(GOOD)
    names = list(CELLS)
    cells = [CELLS[name][0] for name in names]
    pq.write_table(pa.table({"id": names, "clip": cells}), tmp_path / "clips.parquet")
    config = {
        "model": {"id": "demo"},
        "input": {"path": "clips.parquet", "id": "id", "video": "clip", "base_path": str(tmp_path)},
        "video": {"num_frames": 4},
        "prompts": {"what": "Describe this image."},
        "generation": {"max_new_tokens": 4},
        "output": {"path": "out"},
    }
    config["input"] |= {"max_video_sec": 10, "max_pixels": 200_000}
    (tmp_path / "job.yaml").write_text(json.dumps(config))
    planned = _cli("plan", "job.yaml", "--json", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    done = _cli("run", "job.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row["row_id"]: row["error_code"] for row in _rows(tmp_path)}
    assert found == {name: code for name, (_, code) in CELLS.items()}
    assert sum(plan["failed"].values()) == sum(code is not None for code in found.values())
    assert plan["video_tokens"] > 0
    assert plan["image_tokens"] == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _settings(folder: Path, **more: Any) -> LabelSettings:
    return LabelSettings(
        model={"id": str(folder)},
        input={"path": "x", **more.pop("input", {"image": "image", "video": "video"})},
        video={"num_frames": 4},
        generation={"max_new_tokens": 6, "ignore_eos": True},
        **{"prompts": {"a": "What?", "b": "And why is that?"}, **more},
    )  # type: ignore[arg-type]


def _mixed_rows() -> list[Row]:
    clips = [video(20 + 7 * n, 10, 64 + 16 * n, 48) for n in range(3)]
    rows = []
    for n in range(5):
        images = tuple(ImageRef(data=_png(40 * n + k)) for k in range(1 + n % 2))
        videos = tuple(ImageRef(data=clips[(n + k) % 3], kind="video") for k in range(1 + n // 3))
        rows.append(Row(f"r{n}", n, {}, images, videos=videos))
    return rows


def _answers(settings: LabelSettings, works: list[ShardWork]) -> dict[Any, str | None]:
    labeller = Labeller(settings)
    try:
        found: list[Answer] = list(labeller.label(works))
    finally:
        labeller.close()
    assert not [answer.error for answer in found if answer.error]
    return {(answer.key.row, answer.key.prompt): answer.text for answer in found}


@pytest.mark.parametrize("kind", WRITERS)
def test_images_and_videos_of_a_row_answer_alike_alone_and_together(
    folders: Path, kind: str
) -> None:
    settings = _settings(WRITERS[kind](folders / kind))
    rows = _mixed_rows()
    together = _answers(settings, [ShardWork("s", rows)])
    assert len(together) == 10
    alone = {"engine": {"share_images": False, "share_prefix": False, "decode_slots": 1,
                        "overlap": False}}  # fmt: skip
    apart = _settings(folders / kind, **alone)
    assert _answers(apart, [ShardWork("s", rows)]) == together


def test_messages_name_videos(folders: Path) -> None:
    folder = WRITERS["qwen3_vl"](folders / "messages")
    row = _mixed_rows()[3]
    path = folders / "own.mp4"
    path.write_bytes(GOOD)
    parts = [
        {"type": "text", "text": "First "},
        {"type": "video"},
        {"type": "image"},
        {"type": "video_url", "video_url": {"url": "video:1"}},
        {"type": "video", "video": str(path)},
        {"type": "text", "text": " which?"},
    ]
    turns = [{"role": "user", "content": parts}]
    named = Row(row.row_id, 0, {}, row.images, turns, videos=row.videos)
    settings = _settings(folder, prompts={}, input={"messages": "m", "video": "v", "image": "i"})
    assert list(_answers(settings, [ShardWork("s", [named])])) == [(0, "answer")]


def test_a_model_without_videos_is_refused_before_any_work(tmp_path: Path) -> None:
    from tests.helpers.smolvlm_checkpoint import write_smolvlm

    pq.write_table(pa.table({"video": [GOOD]}), tmp_path / "v.parquet")
    input_ = {"path": str(tmp_path / "v.parquet"), "video": "video"}
    settings = _settings(write_smolvlm(tmp_path / "model"), input=input_)
    with pytest.raises(UserError, match="takes no video"):
        estimate(settings)


def test_a_video_that_fills_the_context_says_what_to_lower(folders: Path) -> None:
    folder = WRITERS["qwen2_vl"](folders / "context")
    settings = _settings(folder, input={"video": "v"}, engine={"max_context": 30})
    labeller = Labeller(settings)
    try:
        row = Row("r", 0, {}, videos=(ImageRef(data=GOOD, kind="video"),))
        answers = list(labeller.label([ShardWork("s", [row])]))
    finally:
        labeller.close()
    assert {answer.error_code for answer in answers} == {"prompt_too_long"}
    assert all("lower video.max_frames" in str(answer.error) for answer in answers)
