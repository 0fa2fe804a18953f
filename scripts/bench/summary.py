"""What is worth keeping of a measurement: rates, stages, shares of the limits, failures."""

from __future__ import annotations

import sys
from typing import Any

from scripts.bench import ceilings, limits, measure, results, roofline

BYTES = {"none": 2, "fp8": 1}


def row(found: measure.Measurement, device: str) -> dict[str, Any]:
    """The measured part of a result row."""
    reps = found.repetitions
    tokens = [(r.num_prompt_tokens + r.num_output_tokens) / r.seconds for r in reps]
    last = reps[-1]
    return {
        "rows_per_s": results.quantiles([len(rep.answers) / rep.seconds for rep in reps]),
        "tokens_per_s": round(sorted(tokens)[len(tokens) // 2]),
        "images_per_s": round(len(last.workload.images) / last.seconds, 2),
        "seconds": [round(rep.seconds, 3) for rep in reps],
        "seeds": [rep.workload.seed for rep in reps],
        "start_s": round(found.start_seconds, 1),
        "warmup_s": round(found.warmup_seconds, 1),
        "cached_share": round(last.num_cached_tokens / max(1, last.num_prompt_tokens), 4),
        "padding_share": round(last.padding_share, 4),
        "slot_occupancy": round(last.slot_occupancy, 4),
        "slot_occupancy_while_work_waits": last.busy_occupancy and round(last.busy_occupancy, 4),
        "failed": sum(rep.num_failed for rep in reps),
        "prompt_tokens": last.num_prompt_tokens,
        "output_tokens": last.num_output_tokens,
        "memory": results.peak_memory(device),
        "stats": {key: value for key, value in last.stats.items() if value},
    }


def of_the_limit(
    found: measure.Measurement,
    model: str,
    device: str,
    options: dict[str, Any],
    engine: dict[str, Any],
    with_stages: bool,
) -> dict[str, Any]:
    """The share of the card's bf16 peak, and with it each stage beside its own ceiling."""
    last = found.repetitions[-1]
    size = 2 if device.startswith("cuda") else 4
    float8 = engine.get("kv_cache") == "fp8"
    needed = measure.needed_work(last, model, options, size, float8)
    if needed is None:
        return {"share_of_peak": None}
    work, shapes = needed
    peaks = limits.peaks(device)
    row = {
        "share_of_peak": round(measure.limit_share(last, work, peaks), 4),
        "peak_tflops": round(peaks.flops / 1e12, 3),
        "peak_gb_s": round(peaks.bytes_per_s / 1e9),
    }
    if with_stages and shapes is not None:
        kind = options.get("quantization", "none")
        measured = ceilings.measure(shapes, device, peaks, kind)
        weight = BYTES[kind] if device.startswith("cuda") else 4
        stages = roofline.stages(last, work, shapes, measured, weight)
        print("\n".join(roofline.lines(stages, last)), file=sys.stderr, flush=True)
        row["roofline"] = stages
    return row
