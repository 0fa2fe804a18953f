"""Each fused Triton kernel equals its reference: on a GPU where there is one, and interpreted.

Where there is no GPU, the same tests run once more in a process with Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pipeline.kernels import (
    backend,
    cascade_attention,
    decode_attention,
    fp8,
    lanes,
    matmul,
    patchify,
    rms_norm,
    swiglu,
    window_attention,
)
from pipeline.kernels.attention import plan_attention
from pipeline.kernels.prefill_attention import Run, plan_prefill, prefill_attention

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

needs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="the interpreted run has it")


@pytest.fixture(autouse=True)
def _kernels(_clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("VLM_BATCH_KERNELS", "triton")
    assert backend.use_triton(torch.empty(0, device=DEVICE)) == (CUDA or INTERPRETED)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run here already")
def test_interpreted() -> None:
    """This file again, interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout, "the interpreted run must skip this test and run the others"


@needs_kernels
@pytest.mark.parametrize("head_dim", [80, 64, 16])
def test_window_attention(head_dim: int) -> None:
    torch.manual_seed(0)
    heads, lengths = 4, [64, 64, 7, 1, 32]
    total, half = sum(lengths), head_dim // 2
    qkv = torch.randn(total, 3 * heads * head_dim, device=DEVICE)
    angles = torch.rand(total, half, device=DEVICE) * 6
    cos, sin = angles.cos(), angles.sin()
    plan = window_attention.plan_windows(lengths, qkv)
    assert plan.table is not None
    found = window_attention.window_attention(qkv, cos, sin, plan, heads, head_dim**-0.5)
    dense = window_attention.WindowPlan(None, plan_attention(lengths, DEVICE))
    wide = [t.double() for t in (qkv, cos, sin)]
    expected = window_attention.window_attention_reference(*wide, dense, heads, head_dim**-0.5)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@needs_kernels
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(residual: bool) -> None:
    torch.manual_seed(0)
    x, extra = torch.randn(2, 5, 300, device=DEVICE)
    weight = torch.randn(300, device=DEVICE)
    arguments = (x, weight, 1e-6, extra if residual else None)
    found, expected = rms_norm.rms_norm(*arguments), rms_norm.rms_norm_reference(*arguments)
    torch.testing.assert_close(found, expected)
    quantized, total = rms_norm.rms_norm_fp8(*arguments)
    torch.testing.assert_close(total, expected[1])
    near(quantized, fp8.quantize_rows_reference(expected[0]))


@needs_kernels
@pytest.mark.parametrize("width", [300, 256, 1000])
def test_swiglu(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * width, device=DEVICE)
    expected = swiglu.swiglu_reference(x)
    torch.testing.assert_close(swiglu.swiglu(x), expected)
    near(swiglu.swiglu_fp8(x), fp8.quantize_rows_reference(expected))


def near(found: fp8.Quantized, expected: fp8.Quantized) -> None:
    torch.testing.assert_close(found.scale, expected.scale)
    # The interpreter loses the carry where float8 rounds up to a power of two; a GPU does not.
    other = found.values.float() != expected.values.float()
    assert other.float().mean() < (0.002 if CUDA else 0.05)


@needs_kernels
@pytest.mark.parametrize("dim", [32, 24])
def test_prefill_attention(dim: int) -> None:
    """Blocks that need no mask (a power of two of channels) and those that do."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 700, dim, device=DEVICE)
    runs = [
        Run(0, 200, ((1, 90), (300, 200))),
        Run(200, 130, ((1, 90), (100, 150), (520, 130))),
        Run(330, 3, ((1, 90), (680, 3))),
    ]
    q = torch.randn(333, 4, dim, device=DEVICE)
    found = prefill_attention(q, k, v, plan_prefill(runs, q.device, True), 0.2)
    expected = prefill_attention(q, k, v, plan_prefill(runs, q.device, False), 0.2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("splits", [1, 3])
def test_cascade_attention(splits: int) -> None:
    """Ranges read once for several lanes give what each lane reads alone."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 900, 24, device=DEVICE)
    q = torch.randn(6, 14, 24, device=DEVICE)  # seven query heads a key head: nine lanes an item
    prefix, image, other = (1, 200), (300, 150), (500, 130)
    lanes = [
        (prefix, image, (700, 9)),
        (prefix, image, (720, 1)),
        (prefix, other, (730, 30)),
        ((0, 0), other, (770, 65)),
        ((0, 0), (0, 0), (840, 5)),
        ((0, 0), (0, 0), (0, 0)),
    ]
    segments = torch.tensor(lanes, dtype=torch.int32, device=DEVICE)
    taken = torch.tensor(
        [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], device=DEVICE
    ).bool()
    none = [-1] * 9
    rows = [[0, *prefix, 0, 1, 2], [1, *image, 0, 1], [1, *other, 2, 3], [0, 0, 0]]
    items = torch.tensor([(r + none)[:12] for r in rows], dtype=torch.int32, device=DEVICE)
    shared = cascade_attention.SharedReads(items, taken, 4)
    plan = decode_attention.plan_decode(segments, 400, splits)
    found = cascade_attention.cascade_attention(q, k, v, shared.without(plan), shared, 0.2)
    expected = decode_attention.decode_attention(q, k, v, plan, 0.2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("quantized", [False, True])
def test_invariant_matmul(quantized: bool) -> None:
    torch.manual_seed(0)
    a, b, bias = (torch.randn(*s, device=DEVICE) for s in ((150, 100), (140, 100), (140,)))
    scales: tuple[torch.Tensor, ...] = ()
    if quantized:
        (a, a_scale), (b, b_scale) = (fp8.quantize_rows_reference(x) for x in (a, b))
        scales = (a_scale, b_scale)
    whole = matmul.invariant_matmul(a, b, bias, torch.float32, *scales)
    wide = [x.double() for x in (a, b)]
    if quantized:
        wide = [x * scale for x, scale in zip(wide, scales, strict=True)]
    expected = (wide[0] @ wide[1].T + bias).float()
    limit = 0.02 if quantized else 1e-4  # float8 products may accumulate in few bits
    torch.testing.assert_close(whole, expected, atol=limit, rtol=limit)
    few = (scales[0][:7].contiguous(), scales[1]) if quantized else ()
    alone = matmul.invariant_matmul(a[:7].contiguous(), b, bias, torch.float32, *few)
    assert torch.equal(alone, whole[:7])


@needs_kernels
def test_patchify() -> None:
    torch.manual_seed(0)
    sizes = [(56, 28), (4, 28, 56), (28, 84), (2, 56, 28)]
    images = [torch.randint(0, 256, (*s, 3), dtype=torch.uint8, device=DEVICE) for s in sizes]
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    found = patchify.patchify(images, 14, 2, 2, mean, std, torch.float32)
    rows = torch.tensor(mean, device=DEVICE), torch.tensor(std, device=DEVICE)
    expected = patchify.patchify_reference(images, 14, 2, 2, *rows, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


class State(lanes.LaneState):
    """Lanes of every kind; the last one is idle."""

    def __init__(self) -> None:
        def of(*values: int) -> torch.Tensor:
            return torch.tensor(values, device=DEVICE)

        self.tokens = of(5, 6, 7, 8, 0)
        self.positions = of(10, 20, 30, 40, 0)
        self.places = of(100, 200, 300, 400, 0)
        self.segments = torch.arange(30, dtype=torch.int32, device=DEVICE).view(5, 3, 2)
        self.generated = of(0, 3, 4, 1, 0)
        self.status = of(lanes.RUNNING, lanes.RUNNING, lanes.RUNNING, lanes.RUNNING, lanes.IDLE)
        self.limit = of(9, 9, 5, 9, 0)
        self.stop_ids = of(1, 2, -1).expand(5, -1).contiguous()


@needs_kernels
@pytest.mark.parametrize("step", [0, 1])
def test_advance(step: int) -> None:
    rows = torch.tensor([3, 1, 4, 0, 2, 4], device=DEVICE)
    tokens = torch.tensor([11, 2, 9, 12, 13, 9], device=DEVICE)
    valid = torch.tensor([True, True, True, False, True, True], device=DEVICE)
    one, other = State(), State()
    found = lanes.advance(one, rows, tokens, valid, step)
    assert torch.equal(found, lanes.advance_reference(other, rows, tokens, valid, step))
    assert found[1].tolist() == [
        lanes.RUNNING, lanes.STOPPED, lanes.IDLE, lanes.NUMERICAL, lanes.LENGTH, lanes.IDLE,
    ]  # fmt: skip
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name


@needs_kernels
@pytest.mark.parametrize("heads", [(28, 4), (8, 8), (12, 4), (130, 2)])
def test_prefill_of_short_runs(heads: tuple[int, int]) -> None:
    """Tiles of all heads that share keys, beside tiles of one head, in one batch."""
    torch.manual_seed(0)
    num_heads, shared = heads
    k, v = torch.randn(2, shared, 400, 16, device=DEVICE)
    runs = [
        Run(0, 12, ((1, 90), (100, 60), (300, 12))),
        Run(12, 1, ((1, 90), (312, 1))),
        Run(13, 64, ((200, 64),), spans=((3, 30), (50, 9))),
        Run(77, 5, ((1, 90), (320, 5)), spans=((0, 4),)),
    ]
    q = torch.randn(82, num_heads, 16, device=DEVICE)
    plan = plan_prefill(runs, q.device, True)
    tiles = plan.tiles(num_heads // shared)
    packed = {int(t[0]) for t in tiles if t[2] < 0}
    assert packed == ({0, 1, 3} if 1 < num_heads // shared <= 64 else set())
    for window in (None, 20):
        found = prefill_attention(q, k, v, plan, 0.2, window)
        expected = prefill_attention(q, k, v, plan_prefill(runs, q.device, False), 0.2, window)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 7, 64, 65])
def test_tiles_cover_each_query_of_each_head_once(group: int) -> None:
    from pipeline.kernels.prefill_attention import BLOCK_Q

    runs = [Run(0, n, ((0, n),)) for n in (1, 5, 9, 10, 63, 64, 65, 100, 1010)]
    seen = []
    for run, first, which in plan_prefill(runs, torch.device("cpu"), True).tiles(group).tolist():
        tokens, heads = (BLOCK_Q // group, range(group)) if which < 0 else (BLOCK_Q, [which])
        stop = min(first + tokens, runs[run].q_length)
        seen += [(run, token, head) for token in range(first, stop) for head in heads]
    expected = [
        (r, t, h) for r, x in enumerate(runs) for t in range(x.q_length) for h in range(group)
    ]
    assert sorted(seen) == expected
