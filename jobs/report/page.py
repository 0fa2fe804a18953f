"""The report as one HTML file without scripts and without anything fetched.

Knows the numbers of `numbers.collect`; every text of a row is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from jobs.progress import format_seconds
from jobs.report.time_spent import COMPUTED, LOST

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1b1f24;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}
th,td{border-bottom:1px solid #d8dee4;padding:.3rem .6rem;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f6f8fa;padding:.8rem;overflow:auto}
.bar{display:flex;height:1rem;border-radius:.3rem;overflow:hidden;background:#eaeef2}
.ok{background:#2da44e}.failed{background:#cf222e}.filtered{background:#bf8700}
@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}
pre{background:#161b22}th,td{border-color:#30363d}.bar{background:#30363d}}
"""


def render(numbers: dict[str, Any]) -> str:
    """The page."""
    status = numbers["status"]
    parts = [
        f"<h1>{escape(status['path'])}</h1>",
        _summary(status),
        _section("Prompts", _prompts(numbers["prompts"])),
        _section("Failures", _failures(numbers["failures"])),
        _section("Rows committed over time", _curve(numbers["commits"])),
        _section("Where the time went", _time(numbers["time"])),
        _section("First rows", _samples(numbers["samples"])),
        _section("Config", f"<pre>{escape(json.dumps(numbers['config'], indent=2))}</pre>"),
        _section("Made with", _packages(numbers["packages"])),
    ]
    title = escape(f"vlm-batch: {status['path']}")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _summary(status: dict[str, Any]) -> str:
    rows = status["rows"]
    total = max(1, rows["total"])
    bars = "".join(
        f'<div class="{state}" style="width:{100 * rows[state] / total:.3f}%"></div>'
        for state in ("ok", "failed", "filtered")
    )
    words = ", ".join(f"{rows[state]:,} {state}" for state in ("ok", "failed", "filtered"))
    rate = f" {status['rows_per_sec']:,.1f} rows/s." if status["rows_per_sec"] else ""
    return (
        f"<p>{escape(str(status['model']))}: {rows['total']:,} rows, {words}, "
        f"{rows['left']:,} left.{rate}</p>"
        f'<div class="bar" role="img" aria-label="{words}">{bars}</div>'
    )


def _prompts(prompts: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            name,
            f"{p['answers']:,}",
            f"{p['failed']:,}",
            f"{p['cut_share']:.1%}",
            f"{p['prompt_tokens_mean']:,.0f}",
            f"{p['cached_share']:.1%}",
            f"{p['output_tokens_p50']:,}",
            f"{p['output_tokens_p95']:,}",
        )
        for name, p in prompts.items()
    ]
    header = ("prompt", "answers", "failed", "cut at the limit", "prompt tokens, mean",
              "of these cached", "answer tokens, median", "95th percentile")  # fmt: skip
    return _table(header, rows)


def _failures(failures: list[dict[str, Any]]) -> str:
    rows = [(f["code"], f"{f['count']:,}", f["error"], ", ".join(f["row_ids"])) for f in failures]
    return _table(("code", "rows", "first error", "such as"), rows) if rows else "<p>None.</p>"


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    names = [name for name in samples[0] if name not in ("meta", "error_code")]
    rows = [tuple("" if row[name] is None else str(row[name]) for name in names) for row in samples]
    return _table(tuple(names), rows)


def _curve(points: list[tuple[float, int]]) -> str:
    if len(points) < 2:
        return ""
    seconds, total = points[-1]
    x, y = max(seconds, 1e-3), max(total, 1)
    path = " ".join(f"{600 * at / x:.1f},{150 - 150 * rows / y:.1f}" for at, rows in points)
    return (
        f'<svg viewBox="0 0 600 152" role="img" aria-label="{total:,} rows in '
        f'{format_seconds(seconds)}"><polyline points="0,150 {path}" fill="none" '
        f'stroke="#2da44e" stroke-width="2"/></svg>'
        f"<p>{total:,} rows in {format_seconds(seconds)} of work.</p>"
    )


def _time(time: dict[str, Any] | None) -> str:
    if time is None:
        return ""
    named = {(COMPUTED | LOST)[name]: s for name, s in time["stages"].items()}
    named["loading the model, planning, committing"] = time["else"]
    total = max(time["seconds"], 1e-3)
    rows = [(what, f"{s:,.1f}", f"{s / total:.1%}") for what, s in named.items()]
    loss = time["largest_loss"]
    words = [
        f"Largest loss: {loss['what']}, {loss['seconds']:,.1f} s, {loss['share']:.1%} of the"
        " engine's time."
    ]
    shares = {
        "lanes_full": "Lanes full", "padding_share": "padding", "cached_share": "prompt cached",
    }  # fmt: skip
    told = [f"{word} {time[k]:.1%}" for k, word in shares.items() if time[k] is not None]
    if told:
        words.append(f"{', '.join(told)}.")
    if time["out_of_memory"]:
        words.append(f"The device's memory ran out {time['out_of_memory']:,} times.")
    table = _table(("", "seconds, all workers", "share"), rows)
    return f"{table}<p>{escape(' '.join(words))}</p>"


def _packages(packages: dict[str, str]) -> str:
    return f"<p>{escape(', '.join(f'{name} {version}' for name, version in packages.items()))}</p>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    number = text.replace(",", "").replace(".", "").rstrip("%").isdigit()
    return f'<td class="n">{text}</td>' if number else f"<td>{escape(text)}</td>"
