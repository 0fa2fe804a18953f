"""Attention over keys and values in float8 against plain masks in float32 on the same numbers.

What is left is the products' own rounding: with queries of 16 bits it is compared with that of the
library's attention in bfloat16. The references run here, the Triton kernels interpreted in a
process of their own, and on a GPU where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.engine.prefill import gather_runs
from pipeline.kernels.cached_rows import CachedRows, plain_rows, take_rows
from pipeline.kernels.cascade_attention import SharedReads, cascade_attention, lanes_per_item
from pipeline.kernels.decode_attention import decode_attention, plan_decode
from pipeline.kernels.fp8 import FP8, Quantized, quantize_rows_reference
from pipeline.kernels.prefill_attention import Run, prefill_attention, prefill_plan_for
from pipeline.kernels.rope import rope_and_cache, rope_and_cache_reference

PLACES, KV_HEADS, HEADS, SCALE = 900, 2, 14, 0.1
RUNS = (
    Run(0, 110, ((300, 110),), ((5, 20), (60, 50))),
    Run(110, 70, ((1, 90), (500, 33), (95, 70))),
    Run(180, 9, ((500, 33), (240, 9))),
)
LANES = (
    ((1, 200), (300, 150), (700, 9)),
    ((1, 200), (300, 150), (720, 1)),
    ((0, 0), (1, 200), (730, 30)),
    ((0, 0), (0, 0), (840, 5)),
    ((0, 0), (0, 0), (0, 0)),
)
KINDS = ((None, None), (None, 2.5), (280, None))


def cache(dim: int, dtype: torch.dtype, device: str, spread: float) -> Quantized:
    """Rows of very different sizes; a channel that stands out, as biases of Qwen2.5 make."""
    rows = torch.randn(KV_HEADS, PLACES, dim) * torch.logspace(-2, spread, PLACES)[:, None]
    rows[..., 3] += 10 * rows.abs().amax(-1)
    return Quantized(*(x.to(device) for x in quantize_rows_reference(rows.to(dtype))))


def wide(rows: CachedRows) -> Tensor:
    every = torch.arange(PLACES, device=rows[0].device)
    return take_rows(rows, every, torch.float32)


def check(device: str = "cpu") -> None:
    # NOTE: the interpreter cuts bfloat16 off in place of rounding it.
    half = torch.float16 if os.environ.get("TRITON_INTERPRET") else torch.bfloat16
    for dim, dtype in ((32, torch.float32), (24, torch.float16), (128, half)):
        check_attention(device, dim, dtype, KINDS if dim < 128 else KINDS[2:])
        check_write(device, dim, dtype)


def near(found: Tensor, expected: Tensor, rounded: Tensor) -> None:
    """`found` is as near to the truth as twice the same arithmetic in few bits."""
    assert found.isfinite().all()
    limit = 2 * (rounded.float() - expected).abs().max().item() + 1e-5 * expected.abs().max().item()
    error = (found.float() - expected).abs().max().item()
    assert error <= limit, (error, limit, expected.abs().max())


def check_attention(device: str, dim: int, dtype: torch.dtype, kinds: Sequence[Any]) -> None:
    torch.manual_seed(0)
    k, v = cache(dim, dtype, device, 0), cache(dim, dtype, device, 2)
    q = torch.randn(189, HEADS, dim, device=device).to(dtype)
    few = q[: len(LANES)].contiguous()
    runs, rows = gather_runs(RUNS)
    plan = prefill_plan_for(runs, q)
    table = torch.tensor(LANES, dtype=torch.int32, device=device)
    for window, softcap in kinds:
        kind = (SCALE, window, softcap)
        once = plain_rows(k, v, torch.from_numpy(rows).to(device), dtype)
        found = prefill_attention(q, *once, plan, *kind)
        with references():
            own = prefill_plan_for(RUNS, q)
            near(found, *(prefill_attention(*x, own, *kind) for x in plain(q, k, v)))
            steps = plan_decode(table, 400)
            expected = [decode_attention(*x, steps, *kind) for x in plain(few, k, v)]
        for splits in (1, 3):
            steps = plan_decode(table, 400, splits)
            near(decode_attention(few, k, v, steps, *kind), *expected)
            if window is None and steps.index is None:
                near(together(few, k, v, steps, softcap), *expected)


def plain(q: Tensor, k: Quantized, v: Quantized) -> list[list[Tensor]]:
    """The same numbers without scales, in float32 and in the type of `q`."""
    return [[x.to(dtype) for x in (q, wide(k), wide(v))] for dtype in (torch.float32, q.dtype)]


@contextmanager
def references() -> Iterator[None]:
    before = os.environ.get("VLM_BATCH_KERNELS", "auto")
    os.environ["VLM_BATCH_KERNELS"] = "reference"
    yield
    os.environ["VLM_BATCH_KERNELS"] = before


def together(
    q: Tensor, k: CachedRows, v: CachedRows, plan: object, softcap: float | None
) -> Tensor:
    """The lanes' first ranges read together."""
    width = lanes_per_item(HEADS, KV_HEADS)
    rows = [[0, 1, 200, 0, 1], [1, 300, 150, 0, 1], [0] * 5]
    items = torch.tensor([r + [-1] * (width - 2) for r in rows], dtype=torch.int32)
    taken = torch.zeros(len(LANES), 3, dtype=torch.bool)
    taken[:2, :2] = True
    shared = SharedReads(items.to(q.device), taken.to(q.device), 2)
    return cascade_attention(q, k, v, shared.without(plan), shared, SCALE, softcap)


def check_write(device: str, dim: int, dtype: torch.dtype) -> None:
    """The fused write equals the reference; what it wrote comes back within float8's precision."""
    torch.manual_seed(0)
    tokens, half = 7, dim // 2 - (4 if dim == 24 else 0)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * dim, device=device).to(dtype) * 30
    qkv[2] = 0
    angles = torch.rand(tokens, half, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    places = torch.tensor([5, 3, 9, 0, 2, 899, 1], device=device)
    caches = []
    for write in (rope_and_cache, rope_and_cache_reference):
        empty = [
            Quantized(
                torch.zeros(KV_HEADS, PLACES, dim, dtype=FP8, device=device),
                torch.zeros(KV_HEADS, PLACES, 1, device=device),
            )
            for _ in "kv"
        ]
        q = write(qkv, cos, sin, *empty, places, HEADS)
        caches.append((q, *empty))
    plain = [torch.zeros(KV_HEADS, PLACES, dim, dtype=dtype, device=device) for _ in "kv"]
    expected = rope_and_cache_reference(qkv, cos, sin, *plain, places, HEADS)
    torch.testing.assert_close(caches[0][0], expected)
    for found, reference, rows in zip(caches[0][1:], caches[1][1:], plain, strict=True):
        torch.testing.assert_close(found.scale, reference.scale)
        error = (wide(found) - rows.float()).abs().amax(-1) / rows.float().abs().amax(-1)
        # The interpreter loses the carry where float8 rounds up to a power of two.
        other = found.values.float() != reference.values.float()
        assert other.float().mean() < (1e-3 if device == "cuda" else 1e-2)
        assert (other.any() and device == "cpu") or error.nan_to_num().max() < 0.04
        assert wide(reference).sub(rows.float()).abs().amax() <= 0.04 * rows.abs().amax()


def test_references() -> None:
    check()


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check("cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_float8_number_is_read(device: str) -> None:
    """The instructions of the decode kernel give what the format says, NaN too."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    rows = torch.zeros(1, 256, 128, dtype=FP8, device=device)
    rows[0, :, 0], rows[0, :, 1] = numbers, numbers.view(torch.uint8).flip(0).view(FP8)
    scale = torch.ones(1, 256, 1, device=device)
    k, v = Quantized(torch.zeros_like(rows), scale), Quantized(rows, scale)
    table = torch.stack([torch.arange(256), torch.ones(256)], 1)[:, None].int().to(device)
    q = torch.zeros(256, 1, 128, dtype=torch.bfloat16, device=device)
    out = decode_attention(q, k, v, plan_decode(table, 1), 1.0)[:, 0].float()
    torch.testing.assert_close(out, rows[0].float(), equal_nan=True)


def test_interpreted_kernels(root: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLM_BATCH_KERNELS": "triton"}
    command = "from tests.kernels.test_float8_cache import check; check()"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
