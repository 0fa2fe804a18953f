"""A repetition's stages beside what the device could do: seconds, shares, and the largest loss.

Least times come from `ceilings.py`; times taken from the labeller's own stage clocks. Prints for
people, returns numbers for the result row.
"""

from __future__ import annotations

import math
from typing import Any

from scripts.bench.ceilings import Ceilings
from scripts.bench.limits import Shapes, Work
from scripts.bench.measure import Repetition

COMPUTED = ("vision", "prefill", "decode")
WAITS = ("feed_wait", "idle")  # "idle" without the waits for images


def stages(
    rep: Repetition, work: Work, shapes: Shapes, ceilings: Ceilings, weight_bytes_per_value: int
) -> dict[str, Any]:
    """Of each stage the least and the taken seconds; `largest_loss` names the worst."""
    least = ceilings.seconds(
        work, shapes.decoder_values * weight_bytes_per_value, _least_steps(rep)
    )
    taken = {name: _taken(rep, name) for name in (*COMPUTED, *WAITS)}
    taken["idle"] = max(0.0, taken["idle"] - taken["feed_wait"])
    taken["other"] = max(0.0, rep.seconds - sum(taken.values()))
    table = {
        name: {"least_s": round(least.get(name, 0.0), 3), "took_s": round(seconds, 3)}
        for name, seconds in taken.items()
    }
    lost = {name: s["took_s"] - s["least_s"] for name, s in table.items()}
    worst = max(lost, key=lambda name: lost[name])
    return {
        "stages": table,
        "least_s": round(sum(least.values()), 3),
        "took_s": round(rep.seconds, 3),
        "share_of_ceiling": round(sum(least.values()) / rep.seconds, 4),
        "largest_loss": {"stage": worst, "seconds": round(lost[worst], 3)},
        "ceilings_tflops": {
            name: round(getattr(ceilings, name) / 1e12, 3)
            for name in ("vision", "vision_attention", "prefill", "prefill_attention")
        },
    }


def _least_steps(rep: Repetition) -> float:
    """Decode steps if every lane were full in each: each reads the weights once."""
    steps = rep.stats.get("engine.num_steps", 0)
    lanes = rep.stats.get("engine.num_lane_steps", 0) / steps if steps else 1
    return math.ceil(rep.num_output_tokens / max(1.0, lanes))


def _taken(rep: Repetition, stage: str) -> float:
    return sum(s for key, s in rep.stats.items() if key.endswith(f"seconds.{stage}"))


def lines(found: dict[str, Any], rep: Repetition) -> list[str]:
    """The table for people."""
    out = [f"{'stage':12}{'least s':>10}{'took s':>10}{'lost s':>10}{'share':>9}"]
    for name, times in found["stages"].items():
        out.append(_line(name, times["least_s"], times["took_s"]))
    out.append(_line("all", found["least_s"], found["took_s"]))
    worst = found["largest_loss"]
    share = worst["seconds"] / found["took_s"]
    out.append(f"Largest loss: {worst['stage']}, {worst['seconds']:.3f} s, {share:.1%} of the run.")
    busy = rep.busy_occupancy
    waiting = f" ({busy:.1%} while work waited)" if busy is not None else ""
    out.append(
        f"Padding {rep.padding_share:.1%}, lanes full {rep.slot_occupancy:.1%}{waiting}, "
        "waiting for images "
        f"{found['stages']['feed_wait']['took_s'] / found['took_s']:.1%}."
    )
    return out


def _line(name: str, least: float, took: float) -> str:
    share = f"{least / took:9.1%}" if least and took else "        -"
    return f"{name:12}{least:10.3f}{took:10.3f}{took - least:10.3f}{share}"
