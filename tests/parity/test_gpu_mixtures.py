"""On a GPU Janus-Pro, DeepSeek-VL2 and Kimi-VL compute what they compute on a CPU.

Also the kernels of mixtures and of latent attention at the sizes of Kimi-VL, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.kernels import grouped_gemm, mla_attention, mla_pack, router
from pipeline.kernels.decode_attention import plan_decode
from pipeline.kernels.prefill_attention import Run, prefill_plan_for
from pipeline.models.base import DenseAttend, Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.loading import load_model
from pipeline.models.registry import family_for
from pipeline.settings import ModelSettings
from tests.engine.engine_bench import Bench, outputs, questions
from tests.helpers.deepseek_vl2_checkpoint import write_deepseek_vl2
from tests.helpers.janus_checkpoint import write_janus
from tests.helpers.kimi_vl_checkpoint import write_kimi_vl
from tests.helpers.parity import Prompt, difference, make_prompt, random_image, random_text

pytestmark = pytest.mark.gpu
WRITERS: dict[str, Callable[[Path], Path]] = {
    "janus": write_janus,
    "deepseek-tiny": partial(write_deepseek_vl2, kind="tiny"),
    "deepseek-small": partial(write_deepseek_vl2, kind="small"),
    "deepseek-base": partial(write_deepseek_vl2, kind="base"),
    "kimi": write_kimi_vl,
}
SIZES = [(61, 45), (140, 56), (61, 45)]
DEVICE = "cuda"
HIDDEN, INNER, EXPERTS, TOP = 2048, 1408, 64, 6
HEADS, ROPE, RANK = 16, 64, 512


def _load(folder: Path, device: str, dtype: torch.dtype) -> Model:
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    return load_model(checkpoint, family_for(checkpoint, settings), device, dtype)


def _prompt(model: Model) -> Prompt:
    parts = [p for i, size in enumerate(SIZES) for p in (random_text(4, i), random_image(*size, i))]
    return make_prompt(model.family, [*parts, random_text(5)])


def _logits(model: Model, prompt: Prompt) -> Tensor:
    positions, _ = model.family.positions(prompt.tokens, prompt.placed())
    images = [torch.from_numpy(image).to(model.device) for image in prompt.images]
    features = model.encode_images(images, list(prompt.layouts))
    tokens = torch.from_numpy(prompt.tokens).long().to(model.device)
    x = model.embed(tokens, features, torch.from_numpy(prompt.where).to(model.device))
    decoder = model.decoder
    placed = torch.from_numpy(positions).to(model.device)
    return decoder.logits(decoder(x, placed, DenseAttend(decoder.config))).cpu()


@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_logits_equal_the_cpus(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / kind)
    cpu = _load(folder, "cpu", torch.float32)
    prompt = _prompt(cpu)
    expected = _logits(cpu, prompt)
    assert difference(_logits(_load(folder, DEVICE, torch.float32), prompt), expected) < 1e-3
    rounded = _logits(_load(folder, DEVICE, torch.bfloat16), prompt)
    # NOTE: in bfloat16 a token whose scores lie close may go to another expert.
    alike = torch.nn.functional.cosine_similarity(rounded, expected)
    assert alike.median() > 0.995


@pytest.mark.parametrize("kind", WRITERS)
def test_engine_gives_the_cpus_tokens(kind: str, tmp_path: Path) -> None:
    """In float32: recorded steps, latent cache, shared segments."""
    folder = WRITERS[kind](tmp_path / kind)
    found = []
    for device in ("cpu", DEVICE):
        bench = Bench.open(folder, device=device)
        model = bench.settings.model.model_copy(update={"dtype": "float32"})
        bench.settings = bench.settings.model_copy(update={"model": model})
        found.append(outputs(bench.run(questions(bench))))
    same = sum(found[0][key] == found[1][key] for key in found[0])
    assert same >= len(found[0]) - 1


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_an_error")
@pytest.mark.parametrize("kind", WRITERS)
@torch.inference_mode()
def test_nothing_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    model = _load(WRITERS[kind](tmp_path / kind), DEVICE, torch.bfloat16)
    prompt = _prompt(model)
    images = [torch.from_numpy(image).to(DEVICE) for image in prompt.images]
    first = model.encode_images(images, list(prompt.layouts))
    x = model.embed(torch.arange(9, device=DEVICE))
    at = torch.arange(9, device=DEVICE)[None]
    model.decoder(x, at, DenseAttend(model.decoder.config))
    torch.cuda.set_sync_debug_mode("error")
    again = model.encode_images(images, list(prompt.layouts))
    for layer in model.decoder.layers:
        layer.out(layer.qkv(x)[:, : _out_width(model)])
        layer.mlp(x)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def _out_width(model: Model) -> int:
    c = model.decoder.config
    return c.num_heads * (c.head_dim if c.mla is None else c.mla.rank)


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
    assert torch.equal(chosen, expected)
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
