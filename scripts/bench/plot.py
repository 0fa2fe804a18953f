"""The README's plot as SVG: rows a second of each workload, each on its own scale.

Drawn from the same rows as the table. Plain shapes and text; the same rows give the same bytes.
"""

from __future__ import annotations

from scripts.bench import report, workloads

WIDTH, LEFT, RIGHT = 720, 96, 96
BAR, GAP, GROUP = 14, 3, 20
TOP, BOTTOM = 46, 16
SERIES = (
    ("vLLM, bf16", "#9aa0a6"),
    ("vlm-batch, bf16", "#2563eb"),
    ("vlm-batch, fp8", "#f59e0b"),
    ("fp8, cache too", "#b45309"),
)


def svg() -> str:
    """The whole file."""
    groups = [(work, _values(work)) for work in workloads.NAMES]
    groups = [(work, values) for work, values in groups if any(values)]
    shown = [i for i in range(len(SERIES)) if any(values[i] for _, values in groups)]
    height = TOP + BOTTOM + len(groups) * (len(shown) * (BAR + GAP) + GROUP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *_legend(shown),
    ]
    y = TOP
    for work, values in groups:
        parts += _group(y, work, [(i, values[i]) for i in shown])
        y += len(shown) * (BAR + GAP) + GROUP
    return "\n".join([*parts, "</svg>", ""])


def _values(work: str) -> tuple[float | None, ...]:
    """Rows a second in the order of SERIES."""
    ours = (report.on_gpu(work), report.on_gpu(work, "fp8"), report.whole_fp8(work))
    rows = (report.vllm(work), *ours)
    return tuple(row["rows_per_s"]["p50"] if row else None for row in rows)


def _legend(shown: list[int]) -> list[str]:
    parts = [_text(12, 16, "Rows a second, each workload on its own scale", "start", "#111827")]
    x = LEFT
    for i in shown:
        name, colour = SERIES[i]
        parts.append(f'<rect x="{x}" y="25" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 15, 34, name, "start", "#374151"))
        x += 140
    return parts


def _group(y: int, work: str, values: list[tuple[int, float | None]]) -> list[str]:
    largest = max(value for _, value in values if value)
    middle = y + len(values) * (BAR + GAP) // 2 + 4
    parts = [_text(LEFT - 10, middle, work, "end", "#111827")]
    for i, value in values:
        length = round((WIDTH - LEFT - RIGHT) * (value or 0) / largest, 1)
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{length}" height="{BAR}" fill="{SERIES[i][1]}"/>'
        )
        label = "not measured" if value is None else f"{value:.4g}"
        parts.append(_text(LEFT + length + 6, y + 11, label, "start", "#374151"))
        y += BAR + GAP
    return parts


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
