"""The kernels of expert mixtures and of compressed caches equal their references (interpreted)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERTS = """
import torch
from pipeline.kernels import grouped_gemm as g
def check_blocks(chosen, experts):
    flat, size = chosen.flatten(), g.block_rows(chosen.numel(), experts)
    sorting = g.expert_blocks(chosen, experts, size)
    assert (sorting.order.long() == flat.argsort(stable=True)).all()
    used = sorting.blocks[sorting.blocks[:, 0] >= 0]
    rows = torch.cat([torch.arange(a, b) for _, a, b in used.tolist()])
    assert (rows == torch.arange(len(flat))).all()
    for expert, first, stop in used.tolist():
        assert 0 < stop - first <= size
        assert (flat[sorting.order[first:stop].long()] == expert).all()
torch.manual_seed(0)
check_blocks(torch.randint(0, 5, (3000, 3)), 5)  # more than are read at once
cases = (37, 6, 2, 80, 48), (1, 8, 3, 64, 64), (40, 2, 2, 32, 40)
for tokens, experts, top, hidden, inner in cases:
    x = torch.randn(tokens, hidden)
    chosen = torch.rand(tokens, experts).topk(top, 1).indices
    chosen[: tokens // 2] = torch.arange(top)  # some experts busy, some idle
    weights = torch.rand(tokens, top)
    gate_up = torch.randn(experts, 2 * inner, hidden) / hidden**0.5
    down = torch.randn(experts, hidden, inner) / inner**0.5
    check_blocks(chosen, experts)
    weighed = g.ExpertWeights(gate_up, down)
    found = g.routed_experts(x, chosen.int(), weights, weighed)
    expected = g.routed_experts_reference(x, chosen, weights, weighed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
from pipeline.kernels import router
for tokens, experts, top in ((5, 8, 3), (33, 72, 6), (1, 64, 1)):
    logits, bias = torch.randn(tokens, experts), torch.randn(experts)
    for given in (None, bias):
        for sigmoid, normalised in ((False, False), (True, True), (True, False)):
            options = (logits, given, top, sigmoid, normalised, 2.5)
            chosen, by = router.choose_experts(*options)
            expected, their = router.choose_experts_reference(*options)
            assert (chosen == expected).all()
            torch.testing.assert_close(by, their)
"""
LATENT = """
import torch
from pipeline.kernels.decode_attention import DecodePlan
from pipeline.kernels.prefill_attention import Run, plan_prefill
from pipeline.kernels import mla_attention as m
from pipeline.kernels import mla_pack as p
torch.manual_seed(0)
rope, rank, places = 8, 40, 500
cache = torch.randn(places, rope + rank)
def expected(q, segments, seen):
    rows = torch.cat([cache[s : s + n] for s, n in segments])
    if not len(rows):
        return torch.zeros(q.shape[0], q.shape[1], rank)
    scores = torch.einsum("thd,kd->htk", q, rows) * 0.3
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htk,kd->thd", weights, rows[:, rope:])
for heads in (17,):
    lanes = [((0, 0), (3, 40), (100, 61)), ((0, 0), (0, 0), (7, 1)), ((0, 0),) * 3]
    table = torch.tensor(lanes, dtype=torch.int32)
    q = torch.randn(3, heads, rope + rank)
    for splits in (1, 3):
        found = m.mla_decode(q, cache, DecodePlan(table, splits), 0.3, rope)
        for lane, segments in enumerate(lanes):
            total = sum(n for _, n in segments)
            one = expected(q[lane : lane + 1], segments, torch.ones(1, total, dtype=torch.bool))
            torch.testing.assert_close(found[lane : lane + 1], one, rtol=1e-4, atol=1e-5)
    runs = [
        Run(0, 40, ((10, 40),)), Run(40, 9, ((10, 33), (200, 9))),
        Run(49, 1, ((10, 33), (200, 9), (300, 1))), Run(50, 6, ((10, 33), (400, 17))),
    ]
    q = torch.randn(56, heads, rope + rank)
    for device_path in (True, False):
        plan = plan_prefill(runs, torch.device("cpu"), device_path)
        found = m.mla_prefill(q, cache, plan, 0.3, rope)
        for run in runs:
            total = sum(n for _, n in run.segments)
            at = torch.arange(total - run.q_length, total)[:, None]
            rows = slice(run.q_start, run.q_start + run.q_length)
            one = expected(q[rows], run.segments, torch.arange(total) <= at)
            torch.testing.assert_close(found[rows], one, rtol=1e-4, atol=1e-5)
    joined = torch.randn(5, heads * 11 + rope + rank)
    q_rope, row = joined[:, : heads * 11].view(5, heads, 11)[..., :rope], joined[:, heads * 11 :]
    weight, packed = torch.randn(rank), torch.zeros(2, 5, heads + 1, rope + rank)
    p.pack_row(packed[0], q_rope, row, weight, 1e-6)
    p.pack_row_reference(packed[1], q_rope, row, weight, 1e-6)
    torch.testing.assert_close(packed[0], packed[1])
    packed = torch.randn(5, (heads + 1) * (rope + rank))
    other, kept_cache = packed.clone().view(5, heads + 1, -1), cache.clone()
    cos, sin = torch.rand(2, 5, rope // 2)
    where = torch.tensor([4, 9, 2, 8, 1])
    turned = m.mla_rope_and_cache(packed, cos, sin, cache, where)
    assert turned.shape == (5, heads, rope + rank)
    p.turn_and_cache_reference(other, cos, sin, kept_cache, where)
    torch.testing.assert_close(turned, other[:, :-1])
    torch.testing.assert_close(cache, kept_cache)
"""


@pytest.mark.parametrize("script", [EXPERTS, LATENT], ids=["experts", "latent"])
def test_kernels_equal_references(root: Path, script: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLM_BATCH_KERNELS": "triton"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
