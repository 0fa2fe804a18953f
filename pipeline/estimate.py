"""What a job will cost, from image headers and prompts alone: for `vlm-batch plan`.

Counts are exact for the rows that were read; time is arithmetic over a card's usual speed, with
every answer at its full length. Writes nothing and loads no weight. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family, ModelSizes
from pipeline.models.registry import family_for
from pipeline.planner import Plan, Planner, PlanStats
from pipeline.prefetch import ImageLoader
from pipeline.prepare import Preparer, Unstored
from pipeline.prompts import prompt_columns
from pipeline.rows import Answer, Group, ImageLayout, Request, Row
from pipeline.settings import EngineSettings, LabelSettings
from pipeline.tokenizer import Tokenizer

WINDOW_REQUESTS = 16_384  # planned together, about what the labeller sees at once
MAX_SLOTS = 512  # as the engine takes on a GPU
WORKSPACE_BYTES = 2_000_000_000  # libraries, captured graphs, a small prefill's activations
SMALL_CACHE = 8_192  # tokens, for the least card
_BAND_TOKENS = 256
_DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Card:
    """A card's memory and peak speed, and the share of the peaks that the engine reaches."""

    name: str
    memory_gb: float
    tflops: float  # dense bfloat16
    bandwidth_gb: float  # a second
    prefill_share: float = 0.62
    vision_share: float = 0.5
    decode_share: float = 0.75


CARDS = {
    "h100": Card("H100", 80, 989, 3350),
    "h200": Card("H200", 141, 989, 4800),
    "b200": Card("B200", 180, 2250, 8000),
    "a100": Card("A100 80 GB", 80, 312, 2039),
    "l40s": Card("L40S", 48, 362, 864),
    "a10": Card("A10", 24, 125, 600),
    "rtx4090": Card("RTX 4090", 24, 165, 1008),
}


@dataclass(slots=True)
class Band:
    """Groups whose prefill length ends in one band of tokens."""

    max_tokens: int
    num_groups: int = 0
    num_requests: int = 0
    num_buckets: int = 0
    tokens: int = 0
    rectangle: int = 0

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.rectangle if self.rectangle else 0.0


@dataclass(slots=True)
class Memory:
    """Device memory in GB; `slots` rows decode at once."""

    card_gb: float
    weights_gb: float
    kv_bytes_per_token: int
    kv_gb_per_row: float  # the longest row read
    slots: int
    fits: bool
    needed_gb: float  # of a card that holds the weights and the longest row
    needed_fp8_gb: float  # with model.quantization fp8


@dataclass(slots=True)
class Time:
    """GPU-hours of the whole job by stage, and their price."""

    card: str
    vision_hours: float
    prefill_hours: float
    decode_hours: float
    rows_per_second: float
    cost: float | None = None

    @property
    def hours(self) -> float:
        return self.vision_hours + self.prefill_hours + self.decode_hours


@dataclass(slots=True)
class Estimate:
    """The dry run's result: counts are of the rows read, hours and cost are scaled to all rows."""

    family: str
    fused: bool
    rows: int
    rows_read: int
    failed: dict[str, int]
    stats: PlanStats
    image_tokens: int
    video_tokens: int
    output_tokens: int  # at most
    audio_tokens: int = 0
    bands: list[Band] = field(default_factory=list)
    memory: Memory | None = None
    time: Time | None = None  # None where the model's sizes are unknown

    @property
    def basis(self) -> str:
        """Says what the numbers rest on."""
        if self.rows_read == self.rows:
            return f"the image headers of all {self.rows:,} rows"
        return f"the first {self.rows_read:,} of {self.rows:,} rows"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        stats = {name: getattr(self.stats, name) for name in self.stats.__slots__}
        shares = {"padding_share": self.stats.padding_share, **self.shares}
        time = asdict(self.time) | {"hours": self.time.hours} if self.time else None
        bands = [asdict(band) | {"padding_share": band.padding_share} for band in self.bands]
        named = {key: getattr(self, key) for key in ("family", "fused", "rows", "rows_read")}
        names = ("failed", "image_tokens", "video_tokens", "audio_tokens", "output_tokens")
        counted = {key: getattr(self, key) for key in names}
        return (
            named
            | {"basis": self.basis, **counted, "tokens": stats | shares, "bands": bands}
            | {"memory": asdict(self.memory) if self.memory else None, "time": time}
        )

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the prompt tokens that prefix and image sharing save."""
        total = self.stats.prompt_tokens or 1
        return {
            "prefix_reuse_share": self.stats.prefix_tokens_reused / total,
            "image_reuse_share": self.stats.image_tokens_reused / total,
        }


@dataclass(slots=True)
class _Work:
    """Sums over the requests read."""

    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0
    output_tokens: int = 0
    vision_flops: float = 0.0
    prefill_flops: float = 0.0
    decode_bytes: float = 0.0  # of keys and values, over all steps
    largest: float = 0.0  # bytes of keys and values that one row keeps


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes of what a token and an image state keep in the cache."""

    token: int
    state: int

    @classmethod
    def of(cls, sizes: ModelSizes, settings: LabelSettings) -> _Kept:
        size, float8 = _DTYPE_BYTES[settings.model.dtype], settings.engine.kv_cache == "fp8"
        return cls(sizes.kv_bytes_per_token(size, float8), sizes.values_per_state * size)


def estimate(
    settings: LabelSettings,
    max_rows: int | None = 1000,
    price_per_hour: float | None = None,
    card: str = "h100",
) -> Estimate:
    """Read the first `max_rows` rows (None: all) and add up what they cost. Raises UserError."""
    if card not in CARDS:
        raise UserError(f"no card {card!r} is known; write one of {', '.join(CARDS)}")
    checkpoint = Checkpoint.open(settings.model)
    family = family_for(checkpoint, settings.model)
    total, rows = _read(settings)
    loader = ImageLoader(settings.input)
    tokenizer = Tokenizer(checkpoint, family.control, family.template.spoken)
    preparer = Preparer(settings, family, tokenizer, Unstored(), loader.load)
    planner = Planner(settings.engine, shares=family.fused, whole_images=family.images_reach_back)
    result = Estimate(family.name, family.fused, total, 0, {}, PlanStats(), 0, 0, 0)
    work, kept = _Work(), _Kept.of(family.sizes, settings)
    bands: dict[int, Band] = {}
    read = loader.ahead(islice(rows, max_rows), lambda row: True)
    for requests in _windows(preparer, read, result):
        plan = planner.plan(requests)
        result.stats.add(plan.stats)
        _add_bands(plan, bands)
        _add_work(plan, family.sizes, kept, work)
    loader.close()
    preparer.close()
    if max_rows is None or result.rows_read < min(max_rows, total):
        result.rows = result.rows_read
    result.bands = [bands[key] for key in sorted(bands, reverse=True)]
    result.image_tokens, result.video_tokens = work.image_tokens, work.video_tokens
    result.audio_tokens, result.output_tokens = work.audio_tokens, work.output_tokens
    _add_cost(result, work, family, settings, CARDS[card], price_per_hour)
    return result


def least_card_gb(sizes: ModelSizes, num_states: int = 0, float8: bool = False) -> float:
    """GB of the smallest card that runs the model in bfloat16, or with its decoder in float8.

    That is with the default memory_fraction and a cache of `SMALL_CACHE` tokens, beside them the
    `num_states` of an image that layers attend to.
    """
    kept = SMALL_CACHE * sizes.kv_values_per_token + num_states * sizes.values_per_state
    return _card_gb(sizes.num_bytes(2, float8), 2 * kept, EngineSettings())


def _card_gb(weights: float, kept: float, settings: EngineSettings) -> float:
    """GB of a card of which the engine's share holds `weights` and `kept` bytes and works."""
    return (weights + WORKSPACE_BYTES + kept) / settings.memory_fraction / 1e9


def _read(settings: LabelSettings) -> tuple[int, Iterator[Row]]:
    from pipeline.sources import open_source

    source = open_source(settings.input, columns=prompt_columns(settings))
    files = source.files()
    total = sum(file.num_rows for file in files)
    if settings.input.limit is not None:
        total = min(total, settings.input.limit)
    rows = (row for file in files for row in source.read(file.path, 0, file.num_rows))
    return total, islice(rows, total)


def _windows(preparer: Preparer, rows: Iterable[Row], result: Estimate) -> Iterator[list[Request]]:
    """Prepared requests in windows; rows read and failures are counted into `result`."""
    window: list[Request] = []
    failed: Counter[str] = Counter()
    for number, row in enumerate(rows):
        result.rows_read += 1
        codes = set()
        for item in preparer.prepare("plan", _numbered(row, number)):
            if isinstance(item, Answer):
                codes.add(item.error_code or "engine_error")
            else:
                window.append(item)
        failed.update(codes)
        if len(window) >= WINDOW_REQUESTS:
            yield window
            window = []
    result.failed = dict(failed.most_common())
    if window:
        yield window


def _numbered(row: Row, number: int) -> Row:
    """The row under a number of its own: files count from zero each."""
    return replace(row, index=number)


def _add_bands(plan: Plan, bands: dict[int, Band]) -> None:
    for start, stop in plan.buckets:
        groups = [item for item in plan.items[start:stop] if isinstance(item, Group)]
        longest = groups[0].num_prefill_tokens
        limit = -(-longest // _BAND_TOKENS) * _BAND_TOKENS
        band = bands.setdefault(limit, Band(limit))
        band.num_buckets += 1
        band.num_groups += len(groups)
        band.num_requests += sum(len(group.requests) for group in groups)
        band.tokens += sum(group.num_prefill_tokens for group in groups)
        band.rectangle += longest * len(groups)


def _add_work(plan: Plan, sizes: ModelSizes, kept: _Kept, work: _Work) -> None:
    for item in plan.items:
        for image in item.images:
            work.vision_flops += _vision_flops(sizes, image.layout)
        if not isinstance(item, Group):
            work.prefill_flops += _prefill_flops(sizes, len(item.tokens), len(item.tokens))
            continue
        longest = max(request.num_tokens for request in item.requests)
        work.prefill_flops += _prefill_flops(sizes, item.num_prefill_tokens, longest)
        for request in item.requests:
            new = request.sampling.max_new_tokens
            for image in request.images:
                if image.layout.sound is not None:
                    work.audio_tokens += image.layout.num_tokens
                elif image.layout.clip is None:
                    work.image_tokens += image.layout.num_tokens
                else:
                    work.video_tokens += image.layout.num_tokens
            work.output_tokens += new
            states = kept.state * sum(image.layout.num_states for image in request.images)
            work.decode_bytes += new * ((request.num_tokens + new / 2) * kept.token + states)
            work.largest = max(work.largest, (request.num_tokens + new) * kept.token + states)


def _vision_flops(sizes: ModelSizes, layout: ImageLayout) -> float:
    num_tokens = layout.num_tokens
    if layout.sound is not None:
        return 2 * sizes.audio_params * 2 * num_tokens
    patches = num_tokens * sizes.patches_per_token
    run = min(patches, sizes.patches_per_run or patches)
    if layout.clip is not None:
        run = min(run, patches // layout.grid[0])  # no frame of a video sees another
    attention = 4 * patches * run * sizes.vision_width * sizes.vision_full_blocks
    return 2 * (sizes.vision_params * patches + sizes.projector_params * num_tokens) + attention


def _prefill_flops(sizes: ModelSizes, num_tokens: int, length: int) -> float:
    attention = 2 * num_tokens * length * sizes.num_heads * sizes.head_dim * sizes.num_layers
    return 2 * (sizes.active_params or sizes.decoder_params) * num_tokens + attention


def _add_cost(
    result: Estimate, work: _Work, family: Family, settings: LabelSettings, card: Card,
    price_per_hour: float | None,
) -> None:  # fmt: skip
    sizes, model = family.sizes, settings.model
    if not sizes.num_params or not result.stats.num_requests:
        return
    value_bytes = _DTYPE_BYTES[model.dtype]
    weights = sizes.num_bytes(value_bytes, model.quantization == "fp8")
    weights_fp8 = sizes.num_bytes(value_bytes, float8=True)
    usable = card.memory_gb * 1e9 * settings.engine.memory_fraction - weights - WORKSPACE_BYTES
    row_bytes = work.largest
    slots = max(0, min(MAX_SLOTS, int(usable // max(row_bytes, 1))))
    result.memory = Memory(
        card_gb=card.memory_gb,
        weights_gb=weights / 1e9,
        kv_bytes_per_token=_Kept.of(sizes, settings).token,
        kv_gb_per_row=row_bytes / 1e9,
        slots=slots,
        fits=slots > 0,
        needed_gb=_card_gb(weights, row_bytes, settings.engine),
        needed_fp8_gb=_card_gb(weights_fp8, row_bytes, settings.engine),
    )
    if slots and result.fused:
        scale = result.rows / result.rows_read / 3600
        speed = card.tflops * 1e12
        steps_bytes = work.output_tokens / slots * weights + work.decode_bytes
        vision = work.vision_flops / (speed * card.vision_share) * scale
        prefill = work.prefill_flops / (speed * card.prefill_share) * scale
        decode = steps_bytes / (card.bandwidth_gb * 1e9 * card.decode_share) * scale
        result.time = Time(card.name, vision, prefill, decode, 0.0)
        result.time.rows_per_second = result.rows / (result.time.hours * 3600)
        if price_per_hour is not None:
            result.time.cost = result.time.hours * price_per_hour
