"""Windows, soft caps and image spans of the attention kernels against plain masks in float32.

Cases hold prefix, group and own segments. The references run here, the Triton kernels interpreted
in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.kernels.decode_attention import decode_attention, plan_decode
from pipeline.kernels.prefill_attention import Run, prefill_attention, prefill_plan_for

HEADS, KV_HEADS, DIM, PLACES, SCALE = 4, 2, 32, 700, 0.3
# a text, a run with segments before it, one that is a span from end to end, one token alone; then
# image states, which every query sees whole, fewer of them than queries and more
RUNS = (
    Run(0, 150, ((300, 150),), ((5, 20), (100, 50))),
    Run(150, 140, ((1, 90), (500, 33), (95, 140)), ((0, 1), (30, 101))),
    Run(290, 9, ((500, 33), (240, 9)), ((0, 9),)),
    Run(299, 1, ((1, 90), (250, 1))),
)
STATES = (Run(0, 140, ((600, 40),), ((0, 140),)), Run(140, 9, ((7, 70), (300, 3)), ((0, 9),)))
# windows and soft caps; heads fill their blocks, so that some blocks need no mask
KINDS = ((None, None), (None, 2.5), (17, None), (280, 2.5), (150, None), (1, None))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """`q` [T, Hq, D] over `k`, `v` [L, Hk, D] under the mask `seen` [T, L]."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@cache
def mask_of(run: Run, window: int | None) -> Tensor:
    """transformers' rule: (causal, or in one span) and within the window."""
    total = sum(n for _, n in run.segments)
    first = total - run.q_length
    seen = torch.zeros(run.q_length, total, dtype=torch.bool)
    for row, key in product(range(run.q_length), range(total)):
        at = first + row
        together = any(s <= row < s + n and s <= key - first < s + n for s, n in run.spans)
        near = window is None or key > at - window
        seen[row, key] = (key <= at or together) and near
    return seen


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    k, v = torch.randn(2, KV_HEADS, PLACES, DIM).to(device)
    return torch.randn(300, HEADS, DIM).to(device), k, v


def keys_of(cache: Tensor, segments: Any) -> Tensor:
    return torch.cat([cache[:, s : s + n] for s, n in segments], 1).transpose(0, 1)


def check_prefill(device: str, spans: bool) -> None:
    q, k, v = inputs(device)
    runs = RUNS if spans else tuple(Run(r.q_start, r.q_length, r.segments) for r in RUNS)
    plan = prefill_plan_for(runs, q)
    for window, softcap in KINDS if spans else KINDS[::2]:
        found = prefill_attention(q, k, v, plan, SCALE, window, softcap)
        for run in runs:
            rows = slice(run.q_start, run.q_start + run.q_length)
            keys, values = (keys_of(x, run.segments) for x in (k, v))
            expected = dense(q[rows], keys, values, mask_of(run, window).to(device), softcap)
            torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-5)


def check_states(device: str) -> None:
    q, k, v = inputs(device)
    found = prefill_attention(q, k, v, prefill_plan_for(STATES, q), SCALE)
    for run in STATES:
        rows = slice(run.q_start, run.q_start + run.q_length)
        keys, values = (keys_of(x, run.segments) for x in (k, v))
        everything = torch.ones(run.q_length, len(keys), dtype=torch.bool, device=device)
        expected = dense(q[rows], keys, values, everything, None)
        torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-5)


def check_decode(device: str, splits: int) -> None:
    q, k, v = inputs(device)
    lanes = [
        ((1, 90), (500, 33), (300, 150)),
        ((0, 0), (0, 0), (7, 1)),
        ((0, 0), (1, 90), (600, 7)),
    ]
    table = torch.tensor([*lanes, ((0, 0),) * 3], dtype=torch.int32, device=device)
    plan = plan_decode(table, 300, splits)
    for window, softcap in KINDS:
        found = decode_attention(q[:4].contiguous(), k, v, plan, SCALE, window, softcap)
        for lane, segments in enumerate(lanes):
            keys, values = (keys_of(x, segments) for x in (k, v))
            seen = torch.arange(len(keys), device=device)[None] >= len(keys) - (window or len(keys))
            expected = dense(q[lane : lane + 1], keys, values, seen, softcap)
            torch.testing.assert_close(found[lane][None], expected, rtol=1e-4, atol=1e-5)
        assert not found[3].any(), "a lane without keys gives zeros"


def check(device: str = "cpu") -> None:
    check_prefill(device, True)
    check_prefill(device, False)
    check_states(device)
    check_decode(device, 1)
    check_decode(device, 3)


def test_references() -> None:
    check()


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check("cuda")


def test_interpreted_kernels(root: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLM_BATCH_KERNELS": "triton"}
    command = "from tests.kernels.test_attention_masks import check; check()"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
