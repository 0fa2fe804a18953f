"""`vlm-batch plan`: the dry run, what a job will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.commands.common import config_options, emit, json_option, read_config, table

if TYPE_CHECKING:
    from pipeline.estimate import Estimate


@click.command()
@config_options
@click.option("--rows", type=click.IntRange(1), default=1000, show_default=True, help="Rows read.")
@click.option("--all", "every", is_flag=True, help="Read every row.")
@click.option("--card", default="h100", show_default=True, help="GPU that the time is told for.")
@click.option("--price", type=float, metavar="PER_HOUR", help="Price of a GPU-hour.")
@json_option
def command(
    config: str,
    sets: tuple[str, ...],
    rows: int,
    every: bool,
    card: str,
    price: float | None,
    as_json: bool,
    **short: str | None,
) -> None:
    """Dry run of CONFIG: rows, tokens, buckets, padding, reuse, memory, GPU-hours. Writes nothing.

    Reads headers of images and videos of the first rows and loads no weights.
    """
    from pipeline.estimate import estimate

    job_config = read_config(config, sets, **short)
    result = estimate(
        job_config.label_settings(),
        max_rows=None if every else rows,
        price_per_hour=price,
        card=card.lower(),
    )
    emit(result.as_dict(), _lines(result), as_json)


def _lines(result: Estimate) -> str:
    stats = result.stats
    scale = result.rows / result.rows_read if result.rows_read else 0.0
    facts: list[tuple[str, str]] = [
        ("rows", f"{result.rows:,}"),
        ("family", f"{result.family}{'' if result.fused else ' (not fused)'}"),
        ("basis", result.basis),
        ("prompt tokens", f"{stats.prompt_tokens * scale:,.0f}"),
        ("image tokens", f"{result.image_tokens * scale:,.0f}"),
        *([("video tokens", f"{result.video_tokens * scale:,.0f}")] if result.video_tokens else []),
        *([("audio tokens", f"{result.audio_tokens * scale:,.0f}")] if result.audio_tokens else []),
        ("answer tokens", f"{result.output_tokens * scale:,.0f} at most"),
        ("prefill tokens", f"{stats.prefill_tokens * scale:,.0f} after reuse"),
        ("prefix reuse", f"{result.shares['prefix_reuse_share']:.1%} of prompt tokens"),
        ("image reuse", f"{result.shares['image_reuse_share']:.1%} of prompt tokens"),
        ("padding", f"{stats.padding_share:.2%} in {stats.num_buckets} buckets"),
    ]
    for code, count in result.failed.items():
        facts.append(("will fail", f"{count} of the rows read: {code}"))
    facts += _memory(result) + _time(result)
    bands = [
        (band.max_tokens, band.num_requests, band.num_buckets, f"{band.padding_share:.1%}")
        for band in result.bands
    ]
    header = ("up to tokens", "requests", "buckets", "padding")
    return table(list(facts)) + ("\n\n" + table(bands, header) if bands else "")


def _memory(result: Estimate) -> list[tuple[str, str]]:
    memory = result.memory
    if memory is None:
        return []
    told = f"weights {memory.weights_gb:.1f} GB, KV cache {memory.kv_gb_per_row:.3f} GB a row"
    card = f"on {memory.card_gb:.0f} GB"
    if memory.fits:
        return [("memory", f"{told}: {memory.slots} rows at once {card}")]
    needed = f"a card of {memory.needed_gb:.0f} GB"
    if memory.needed_fp8_gb < memory.needed_gb:
        needed += f", or of {memory.needed_fp8_gb:.0f} GB with model.quantization fp8"
    return [("memory", f"{told}: DOES NOT FIT {card}; it needs {needed}")]


def _time(result: Estimate) -> list[tuple[str, str]]:
    time = result.time
    if time is None:
        return []
    parts = (
        f"vision {time.vision_hours:.2f}, prefill {time.prefill_hours:.2f}, "
        f"decode {time.decode_hours:.2f}"
    )
    told = [
        ("GPU-hours", f"{time.hours:.2f} on {time.card} ({parts})"),
        ("rate", f"{time.rows_per_second:.1f} rows/s"),
    ]
    if time.cost is not None:
        told.append(("cost", f"{time.cost:,.2f}"))
    return told
