"""`init` notices videos: a column of them, or a folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.init import propose, render
from jobs.yaml_source import parse_yaml

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _config(path: Path) -> dict[str, dict[str, object]]:
    text = render(propose(str(path)))
    parse_yaml(text, "job.yaml")
    config: dict[str, dict[str, object]] = yaml.safe_load(text)
    return config


def test_a_column_of_videos(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["a"], "clip": pa.array([None], STRUCT)}), path)
    config = _config(path)
    assert config["input"]["video"] == "clip"
    assert config["input"]["image"] is None
    assert config["video"] == {"fps": 2, "max_frames": 64}


def test_beside_images_and_without(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["a"], "video": ["b"]}), path)
    assert (_config(path)["input"]["image"], _config(path)["input"]["video"]) == ("image", "video")
    pq.write_table(pa.table({"photo": [b"a"]}), path)
    config = _config(path)
    assert config["input"]["image"] == "photo"
    assert "video" not in config
    assert "video" not in config["input"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("a.mp4", "b.webm"), "video"), (("a.gif",), None), (("a.mp4", "b.jpg"), None), ((), None)],
)
def test_folders(tmp_path: Path, names: tuple[str, ...], expected: str | None) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert propose(str(tmp_path)).video == expected
