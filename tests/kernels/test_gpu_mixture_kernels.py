"""On a GPU the kernels of mixtures and of latent attention at the sizes of Kimi-VL, in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.kernels import grouped_gemm, mla_attention, mla_pack, router
from pipeline.kernels.decode_attention import plan_decode
from pipeline.kernels.prefill_attention import Run, prefill_plan_for
from tests.helpers.parity import difference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HIDDEN, INNER, EXPERTS, TOP = 2048, 1408, 64, 6
HEADS, ROPE, RANK = 16, 64, 512


@pytest.mark.parametrize("tokens", [1, 16, 500, 4096])
@torch.inference_mode()
def test_experts_at_their_true_size(tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device=DEVICE) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, device=DEVICE) * INNER**-0.5
    logits = torch.randn(tokens, EXPERTS, device=DEVICE) * 3
    chosen, by = router.choose_experts(logits, None, TOP, True, True, 2.446)
    expected, their = router.choose_experts_reference(logits, None, TOP, True, True, 2.446)
    # Scores that differ in the last bit may change places.
    scores = [logits.sigmoid().gather(1, found.long()) for found in (chosen, expected)]
    torch.testing.assert_close(*scores, rtol=1e-6, atol=0)
    assert (chosen != expected).any(1).float().mean() < 0.01
    torch.testing.assert_close(by, their)
    weights = grouped_gemm.ExpertWeights(gate_up.bfloat16(), down.bfloat16())
    wide = grouped_gemm.ExpertWeights(weights.gate_up.float(), weights.down.float())
    expected = grouped_gemm.routed_experts_reference(x.float(), chosen, by, wide)
    found = grouped_gemm.routed_experts(x, chosen, by, weights)
    assert difference(found.float(), expected) < 0.01
    if torch.cuda.get_device_capability() >= (8, 9):
        rough = grouped_gemm.routed_experts(x, chosen, by, weights.quantized())
        assert difference(rough.float(), expected) < 0.05


@pytest.mark.parametrize("heads", [HEADS, 32])
@torch.inference_mode()
def test_latent_attention_at_its_true_size(heads: int) -> None:
    torch.manual_seed(0)
    dim, scale = ROPE + RANK, 192**-0.5
    cache = torch.randn(6000, dim, device=DEVICE, dtype=torch.bfloat16)
    wide = cache.float()

    def expected(q: Tensor, segments: tuple[tuple[int, int], ...]) -> Tensor:
        rows = torch.cat([wide[s : s + n] for s, n in segments])
        at = torch.arange(len(rows) - len(q), len(rows), device=DEVICE)
        seen = torch.arange(len(rows), device=DEVICE) <= at[:, None]
        scores = torch.einsum("thd,kd->htk", q.float(), rows) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("htk,kd->thd", weights, rows[:, ROPE:])

    runs = [
        Run(0, 700, ((10, 700),)),
        Run(700, 130, ((10, 300), (2000, 130))),
        Run(830, 1, ((10, 300), (2000, 130), (3000, 1))),
        Run(831, 40, ((10, 300), (4000, 1100))),
    ]
    q = torch.randn(871, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    found = mla_attention.mla_prefill(q, cache, prefill_plan_for(runs, q), scale, ROPE)
    for run in runs:
        rows = slice(run.q_start, run.q_start + run.q_length)
        assert difference(found[rows].float(), expected(q[rows], run.segments)) < 0.01
    lanes = [
        ((0, 0), (10, 300), (4000, 1100)),
        ((0, 0), (0, 0), (7, 1)),
        ((5, 9), (90, 30), (0, 3)),
    ]
    table = torch.tensor([*lanes, ((0, 0),) * 3], dtype=torch.int32, device=DEVICE)
    for splits in (1, 8):
        found = mla_attention.mla_decode(
            q[:4], cache, plan_decode(table, 1500, splits), scale, ROPE
        )
        for lane, segments in enumerate(lanes):
            one = expected(q[lane : lane + 1], segments)
            assert difference(found[lane : lane + 1].float(), one) < 0.01
        assert not found[3].any()


@torch.inference_mode()
def test_packing_and_turning_equal_their_references() -> None:
    torch.manual_seed(0)
    dim = ROPE + RANK
    joined = torch.randn(300, HEADS * 192 + dim, device=DEVICE, dtype=torch.bfloat16)
    q_rope = joined[:, : HEADS * 192].view(300, HEADS, 192)[..., :ROPE]
    weight = torch.randn(RANK, device=DEVICE, dtype=torch.bfloat16)
    packed = joined.new_zeros(2, 300, HEADS + 1, dim)
    mla_pack.pack_row(packed[0], q_rope, joined[:, HEADS * 192 :], weight, 1e-6)
    mla_pack.pack_row_reference(packed[1], q_rope, joined[:, HEADS * 192 :], weight, 1e-6)
    torch.testing.assert_close(packed[0], packed[1])
    angles = torch.rand(300, ROPE // 2, device=DEVICE)
    places = torch.randperm(400, device=DEVICE)[:300]
    caches = joined.new_zeros(2, 400, dim)
    packed[1] = packed[0]
    mla_pack.turn_and_cache(packed[0], angles.cos(), angles.sin(), caches[0], places)
    mla_pack.turn_and_cache_reference(packed[1], angles.cos(), angles.sin(), caches[1], places)
    torch.testing.assert_close(packed[0, :, :-1], packed[1, :, :-1])
    torch.testing.assert_close(caches[0], caches[1])
