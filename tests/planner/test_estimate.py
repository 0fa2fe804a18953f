"""The dry run: counts from headers, scaled to all rows, and time as the design measured it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipeline import sources
from pipeline.errors import RowError, UserError
from pipeline.estimate import CARDS, Estimate, estimate
from pipeline.models.families.qwen_vl.spec import _sizes
from pipeline.rows import ImageRef, Row
from pipeline.settings import LabelSettings
from tests.helpers.checkpoints import write_qwen2_5_vl

# Qwen2.5-VL-7B, for the arithmetic only.
BIG = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 128000,
}  # fmt: skip
BIG_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "out_hidden_size": 3584,
}  # fmt: skip


def png(width: int, height: int, shade: int) -> ImageRef:
    buffer = io.BytesIO()
    Image.new("L", (width, height), shade % 256).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


class FakeSource:
    """Two files of equal length; every tenth image of 1024x768 is broken if asked."""

    def __init__(self, count: int, broken: bool, size: tuple[int, int]) -> None:
        self.count, self.broken, self.size = count, broken, size
        self.num_read = 0

    def files(self) -> list[Any]:
        return [SimpleNamespace(path=name, num_rows=self.count // 2) for name in "ab"]

    def read(self, path: str, start: int, stop: int) -> Iterator[Row]:
        for index in range(start, stop):
            self.num_read += 1
            bad = RowError("bad_row") if self.broken and index % 10 == 0 else None
            image = png(*self.size, index + 100 * (path == "b"))
            yield Row(f"{path}:{index}", index, {}, (image,), error=bad)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_qwen2_5_vl(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    limits = {"min_pixels": 3136, "max_pixels": 12_845_056}
    path.write_text(json.dumps(json.loads(path.read_text()) | limits))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= BIG
    config["vision_config"] |= BIG_VISION | {"fullatt_block_indexes": [7, 15, 23, 31]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, count: int = 40, broken: bool = False,
    size: tuple[int, int] = (1024, 768), prompts: Any = None, kv_cache: str = "auto",
    **options: Any,
) -> tuple[Estimate, FakeSource]:  # fmt: skip
    source = FakeSource(count, broken, size)
    monkeypatch.setattr(sources, "open_source", lambda *a, **k: source, raising=False)
    settings = LabelSettings(
        model={"id": str(folder)}, input={"path": "x"}, prompts=prompts or {"a": "Describe."},
        engine={"kv_cache": kv_cache},
    )  # fmt: skip
    return estimate(settings, **options), source


def test_all_rows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    result, _ = run(monkeypatch, folder, max_rows=None, price_per_hour=2.5)
    assert (result.rows, result.rows_read) == (40, 40)
    assert result.basis == "the image headers of all 40 rows"
    assert result.image_tokens == 40 * 999
    assert result.output_tokens == 40 * 128
    assert sum(band.num_requests for band in result.bands) == 40
    assert result.stats.padding_share == 0.0
    assert result.time is not None
    assert result.time.cost == pytest.approx(result.time.hours * 2.5)
    json.dumps(result.as_dict())


def test_the_first_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    whole, _ = run(monkeypatch, folder, max_rows=None)
    part, source = run(monkeypatch, folder, max_rows=10)
    assert (part.rows, part.rows_read) == (40, 10)
    assert source.num_read == 10
    assert part.basis == "the first 10 of 40 rows"
    assert part.time is not None
    assert whole.time is not None
    assert part.time.hours == pytest.approx(whole.time.hours, rel=0.05)


def test_time_is_about_what_was_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """design.md section 7: 11 + 21.8 + 6.45 ms a row on an H100."""
    result, _ = run(monkeypatch, folder, max_rows=None)
    assert result.memory is not None
    assert result.memory.slots == 512
    assert result.memory.weights_gb == pytest.approx(16.6, rel=0.02)
    assert result.time is not None
    per_row = [
        1000 * 3600 * hours / result.rows
        for hours in (result.time.vision_hours, result.time.prefill_hours)
    ]
    assert per_row == pytest.approx([11.0, 21.8], rel=0.15)
    assert 1000 * 3600 * result.time.decode_hours / 40 == pytest.approx(6.45, rel=0.3)
    assert result.time.rows_per_second == pytest.approx(25.9, rel=0.15)


def test_sharing_is_counted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    prompts = {f"q{n}": f"Question {n}?" for n in range(8)}
    result, _ = run(monkeypatch, folder, max_rows=None, prompts=prompts)
    assert result.shares["image_reuse_share"] > 0.8
    assert result.stats.num_images == 8 * result.stats.num_images_encoded
    assert result.time is not None
    single, _ = run(monkeypatch, folder, max_rows=None)
    assert single.time is not None
    assert result.time.vision_hours == pytest.approx(single.time.vision_hours)


def test_failures_are_counted_by_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    result, _ = run(monkeypatch, folder, broken=True, prompts={"a": "x", "b": "y"})
    assert result.failed == {"bad_row": 4}
    assert result.stats.num_requests == 36 * 2


def test_no_rows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    result, _ = run(monkeypatch, folder, count=0)
    assert (result.rows, result.time, result.memory) == (0, None, None)
    assert result.as_dict()["time"] is None


def test_a_card_that_is_too_small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(CARDS, "tiny", CARDS["a10"].__class__("tiny", 8, 100, 500))
    result, _ = run(monkeypatch, folder, card="tiny")
    assert result.memory is not None
    assert not result.memory.fits
    assert result.memory.needed_gb == pytest.approx(20.7, abs=0.1)
    assert result.memory.needed_fp8_gb == pytest.approx(13.4, abs=0.1)
    assert result.time is None
    with pytest.raises(UserError, match="h100"):
        run(monkeypatch, folder, card="abacus")


def test_weight_bytes_by_type() -> None:
    sizes = _sizes(BIG, BIG_VISION, "qwen2_5", False)
    half, full, quantized = (sizes.num_bytes(*each) for each in ((2, False), (4, False), (2, True)))
    assert full == 2 * half
    assert quantized == half - sizes.decoder_params


def test_a_cache_in_float8_keeps_more_rows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plain, eight = (run(monkeypatch, folder, kv_cache=kind)[0].memory for kind in ("auto", "fp8"))
    assert plain is not None
    assert eight is not None
    share = (128 + 4) / 256  # a head's 128 values and a scale
    assert eight.kv_bytes_per_token == share * plain.kv_bytes_per_token
    assert eight.kv_gb_per_row == pytest.approx(share * plain.kv_gb_per_row)
    assert eight.weights_gb == plain.weights_gb
