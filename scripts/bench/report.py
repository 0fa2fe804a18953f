"""The README's numbers, table and plot, made from results.jsonl and from nothing else.

Always the latest row of its kind; the same file gives the same bytes. `scripts/write_docs.py`
calls it.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from functools import cache, partial
from typing import Any

from scripts.bench import results, workloads

KINDS = {
    "caption": "caption: 1024×768, 128 tokens out",
    "mixed": "mixed: 512×384 … 1280×960, 16–400 out",
    "vqa": "vqa: 8 questions an image, 16 out",
    "ocr": "ocr: pages 1275×1650, 600–1200 out",
    "prefix": "prefix: 2,083 shared tokens, 64 out",
}
ONE_SESSION = timedelta(hours=1)
APART = "†"  # marks a ratio to vLLM's rate of another session
Row = dict[str, Any]


@cache
def _rows() -> tuple[Row, ...]:
    return tuple(json.loads(line) for line in results.FILE.read_text().splitlines() if line)


def latest(name: str, **wanted: Any) -> Row | None:
    """The last row of that name whose fields are as wanted.

    Quantization is none and the cache in the model's type unless named.
    """
    fit = _fitting(name, **wanted)
    return fit[-1] if fit else None


def _fitting(name: str, **wanted: Any) -> list[Row]:
    wanted = {"quantization": "none", "kv_cache": "auto"} | wanted
    return [
        row
        for row in _rows()
        if row["name"] == name and all(_field(row, k) == v for k, v in wanted.items())
    ]


def _field(row: Row, name: str) -> Any:
    if name == "kv_cache":
        return row.get("engine", {}).get("kv_cache", "auto")
    return row.get(name, "none")


def on_gpu(
    work: str, quantization: str = "none", model: str = "random 7b", kv_cache: str = "auto"
) -> Row | None:
    """The last row of a workload with that model on a GPU."""
    row = latest(f"{work}/labeller", quantization=quantization, model=model, kv_cache=kv_cache)
    return row if row and "driver" in row else None


def whole_fp8(work: str) -> Row | None:
    """Weights in float8, and keys and values too."""
    return on_gpu(work, "fp8", kv_cache="fp8")


def vllm(work: str) -> Row | None:
    """vLLM's part of the last row that has one, in bf16."""
    row = on_gpu(work)
    return (row.get("vllm") if row else None) or latest(f"{work}/vllm")


def measured() -> str:
    """The README's sentence: one number and what it was measured on."""
    row = on_gpu("caption")
    if row is None:
        return "**Measured:** nothing yet."
    peer = row.get("vllm")
    beside = f", {peer['ratio']:.2f} × vLLM {peer['version']} on the same rows" if peer else ""
    eight = on_gpu("vqa")
    also = f"; {_rate(eight)} answers a second with eight questions an image" if eight else ""
    return (
        f"**Measured:** {_rate(row)} captions a second (1024×768 photographs, 128 tokens each, "
        f"from JPEG bytes to text) on one\n{row['device']} with random Qwen2.5-VL-7B weights in "
        f"bf16, {row['share_of_peak']:.0%} of the work's\nbf16 limit{beside}{also}\n"
        f"({row['date'][:10]}, `scripts/bench.py --shape 7b`, rows in "
        "`scripts/bench/results.jsonl`)."
    )


def table() -> str:
    """Workloads down, engines across, in rows a second."""
    head = ("vLLM, bf16", "bf16", "of its limit", "fp8", "fp8, cache too")
    lines = [f"| workload (rows/s) | {' | '.join(head)} |", "| --- " * 6 + "|"]
    for work in workloads.NAMES:
        plain, eight, whole = on_gpu(work), on_gpu(work, "fp8"), whole_fp8(work)
        share = f"{plain['share_of_peak']:.0%}" if plain else "–"
        ours = (_beside(plain), share, _beside(eight), _beside(whole))
        lines.append(f"| {' | '.join((KINDS[work], _rate(vllm(work)), *ours))} |")
    return "\n".join([*lines, "", *_notes()])


def _notes() -> list[str]:
    """What else was measured, a line each."""
    notes = []
    if row := on_gpu("caption"):
        notes.append(
            f"One {row['device']}, random Qwen2.5-VL-7B weights, {row['rows']} rows, "
            f"{_repetitions()} timed repetitions a cell, {row['date'][:10]}. Rates are their "
            "medians; ratios are medians over paired repetitions, not quotients of the columns."
            + _apart_note()
        )
    if row := latest("check"):
        notes.append(
            f"The model that ships, on a CPU: {row['ratio']:.1f} × the answers a second of "
            f"transformers' `generate` in batches of {row['batch']} ({row['cpu_ratio']:.1f} × by "
            f"processor time), {row['equal']} of {row['answers']} texts equal."
        )
    if row := latest("ready", model="random 7b"):
        notes.append(f"First answer {row['ready_s']:.0f} s after the start of a 7B process.")
    if row := latest("caption/job", model="random 7b"):
        notes.append(
            f"`configs/caption.yaml` from Parquet to Parquet, {row['rows']} rows, load included: "
            f"{row['seconds'][0]:.0f} s."
        )
    if row := latest("caption/24gb"):
        notes.append(f"As on a 24 GB card: {_rate(row)} captions a second.")
    if row := latest("mixed/steady"):
        of_what = f"mixed, {row['rows']} rows, {row['engine']['decode_slots']} lanes"
        if "driver" not in row:
            of_what += ", the same scheduler on a CPU"
        notes.append(
            f"Lanes are {row['slot_occupancy_while_work_waits']:.1%} full while work waits, "
            f"padding is {row['padding_share']:.1%} ({of_what})."
        )
    notes += _deterministic_notes()
    if row := on_gpu("caption", model="random 3b"):
        notes.append(f"3B shapes: {_rate(row)} captions a second.")
    notes += _family_notes()
    notes += _fp8_notes()
    if row := latest("feeder"):
        notes.append(
            f"The host alone decodes and hands over {row['images_per_s']:.0f} images a second "
            f"(1024×768) on {row['cores']} cores, of which {row['workers']} to decode, "
            f"{row['worker_ms_an_image']:.1f} ms of a core an image."
        )
    return [f"- {note}" for note in notes]


def _apart(row: Row) -> bool:
    """Whether vLLM had the same rows on such a card in another session."""
    theirs = (row.get("vllm") or {}).get("date", row["date"])
    return abs(_time(row["date"]) - _time(theirs)) >= ONE_SESSION


def _time(date: str) -> datetime:
    return datetime.fromisoformat(date)


def _apart_note() -> str:
    if not any(map(_apart, _cells())):
        return ""
    return f" {APART} vLLM had the same rows on such a card in another session."


def _cells() -> list[Row]:
    """Our rows in the table."""
    kinds = (on_gpu, partial(on_gpu, quantization="fp8"), whole_fp8)
    return [row for work in workloads.NAMES for kind in kinds if (row := kind(work))]


def _repetitions() -> str:
    """How often the table's own cells were timed, from the least to the most."""
    counts = sorted({len(row["seconds"]) for row in _cells()})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _deterministic_notes() -> list[str]:
    kept = []
    for work in ("caption", "mixed"):
        row = latest("deterministic", work=work)
        plain = _fitting(f"{work}/labeller", model="random 7b")
        # NOTE: of its session or before; a later engine may be quicker.
        known = [p for p in plain if row and _time(p["date"]) - ONE_SESSION <= _time(row["date"])]
        if row and known:
            share = row["rows_per_s"]["p50"] / known[-1]["rows_per_s"]["p50"]
            kept.append(f"{share:.0%} of the rate of {work}")
    return [f"`engine.deterministic: true` keeps {', '.join(kept)}."] if kept else []


def _family_notes() -> list[str]:
    """Captions a second of other families at published sizes."""
    shapes = sorted({row["model"].removeprefix("random ") for row in _rows() if "model" in row})
    found = [(shape, row) for shape in shapes if (row := latest(f"caption/{shape}"))]
    if not found:
        return []
    rates = (f"{shape} {_rate(row)} ({row['share_of_peak']:.0%})" for shape, row in found)
    return [
        f"Other families at published sizes, random weights, bf16, captions a second (of the bf16 "
        f"limit), one repetition of {found[0][1]['rows']} rows: {', '.join(rates)}."
    ]


def _fp8_notes() -> list[str]:
    named = (("fp8", "fp8"), ("fp8_cache", "fp8 for keys and values alone (`engine.kv_cache`)"))
    return [
        _fp8_note(row, what)
        for name, what in named
        if (row := latest(name, model="demo")) is not None
    ]


def _fp8_note(row: Row, what: str) -> str:
    before, after = (sum(pair[i] for pair in row["accuracy"].values()) for i in (0, 1))
    points = 100 * (before - after) / len(row["accuracy"])
    return (
        f"{what} on the model that ships: logits off by {row['logit_error']:.1%}, "
        f"{row['same_text']:.1%} of the answers letter for letter the same, "
        f"{points:.1f} points of right answers lost."
    )


def _beside(row: Row | None) -> str:
    """Our rate, and how many times vLLM's in bf16 on the same rows."""
    if row is None or "vllm" not in row:
        return _rate(row)
    return f"{_rate(row)} ({row['vllm']['ratio']:.2f} ×{APART if _apart(row) else ''})"


def _rate(row: Row | None) -> str:
    if row is None:
        return "–"
    rate = row["rows_per_s"]
    value = rate["p50"] if isinstance(rate, dict) else rate
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
