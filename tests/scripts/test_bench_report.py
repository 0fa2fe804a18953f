"""The README's numbers and plot follow from the rows alone; stages are held against ceilings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.bench import plot, report, results, roofline, workloads
from scripts.bench.ceilings import Ceilings
from scripts.bench.checkpoint import ROPE, SIZES, config
from scripts.bench.limits import Shapes, work
from scripts.bench.measure import Repetition

CEILINGS = Ceilings(
    vision=600e12, vision_attention=400e12, prefill=750e12, prefill_attention=450e12,
    bytes_per_s=4e12,
)  # fmt: skip


def _row(work: str, rate: float, quantization: str = "none", **more: object) -> dict[str, object]:
    return {
        "name": f"{work}/labeller", "driver": "1", "device": "H200", "date": "2026-01-01 00:00",
        "model": "random 7b", "quantization": quantization, "rows": 512, "seconds": [1, 2, 3],
        "rows_per_s": {"p50": rate}, "share_of_peak": 0.5, **more,
    }  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    peer = {"version": "0.23.0", "rows_per_s": {"p50": 18.0}, "ratio": 1.75}
    earlier = peer | {"date": "2025-12-31 00:00"}
    made = [
        _row("caption", 1.0),
        _row("caption", 31.5, vllm=peer),
        _row("caption", 45.0, "fp8"),
        _row("vqa", 200.0, vllm=earlier),
        _row("caption", 70.0, model="random 3b"),
        _row("caption", 99.0, device="AMD", driver=None) | {"name": "other"},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(results, "FILE", file)
    report._rows.cache_clear()
    yield
    report._rows.cache_clear()


def test_the_table_takes_the_latest_rows(rows: None) -> None:
    caption = next(line for line in report.table().splitlines() if line.startswith("| caption"))
    assert [cell.strip() for cell in caption.split("|")[2:-1]] == [
        "18.0", "31.5 (1.75 ×)", "50%", "45.0", "–",
    ]  # fmt: skip
    assert f"200 (1.75 \u00d7{report.APART})" in report.table()
    assert f"{report.APART} vLLM had the same rows on such a card" in report.table()
    assert "3B shapes: 70.0" in report.table()
    assert "1.75 × vLLM 0.23.0" in report.measured()


def test_the_plot_is_well_formed_and_shows_every_engine(rows: None) -> None:
    drawn = plot.svg()
    assert drawn == plot.svg()
    texts = [x.text for x in ElementTree.fromstring(drawn).iter() if x.tag.endswith("text")]
    assert {"vLLM, bf16", "vlm-batch, bf16", "vlm-batch, fp8", "31.5", "45", "18"} <= set(texts)
    assert "ocr" not in texts


def test_ceilings_of_another_model_s_stages() -> None:
    shapes = Shapes.of(config(SIZES["7b"], ROPE["7b"]))
    answers = [(1026, 0, 128)] * 4
    needed = work(shapes, [54 * 74] * 4, answers)
    times = CEILINGS.seconds(needed, shapes.decoder_values * 2, 127)
    assert times["vision"] * 1e3 / 4 == pytest.approx(9.4, abs=0.5)
    assert times["prefill"] * 1e3 / 4 == pytest.approx(18.2, abs=0.5)
    assert times["decode"] > 127 * 14e9 / 4e12  # the weights alone, once a step


def test_many_lanes_compute_longer_than_their_weights_take_to_read() -> None:
    shapes = Shapes.of(config(SIZES["7b"], ROPE["7b"]))
    needed = work(shapes, [], [(1026, 0, 128)] * 512)
    times = CEILINGS.seconds(needed, shapes.decoder_values * 2, 127)
    linear = 512 * 127 * 2 * shapes.decoder_values / CEILINGS.prefill
    read = needed.decode_bytes / CEILINGS.bytes_per_s
    assert times["decode"] == pytest.approx(linear + read)


def test_the_largest_loss_is_named() -> None:
    shapes = Shapes.of(config(SIZES["7b"], ROPE["7b"]))
    load = workloads.Workload("caption", (b"",), {"answer": "?"}, (128,), sizes=((1024, 768),))
    stats = {
        "engine.seconds.vision": 0.02, "engine.seconds.prefill": 0.03,
        "engine.seconds.decode": 1.0, "engine.seconds.feed_wait": 0.5,
        "engine.num_steps": 127.0, "engine.num_lane_steps": 127.0 * 8,
    }  # fmt: skip
    rep = Repetition(load, 2.0, [], stats)
    needed = work(shapes, [54 * 74], [(1026, 0, 128)])
    found = roofline.stages(rep, needed, shapes, CEILINGS, 2)
    assert found["largest_loss"]["stage"] == "decode"
    assert found["stages"]["other"]["took_s"] == pytest.approx(0.45)
    lines = roofline.lines(found, rep)
    assert any(line.startswith("Largest loss: decode") for line in lines)
    assert "waiting for images 25.0%" in lines[-1]
