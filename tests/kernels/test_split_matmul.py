"""Products of few rows: as exact as the library's in any number of parts, and who computes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pipeline.kernels import fp8, rms_norm, split_matmul, swiglu
from pipeline.kernels.split_matmul import Plan, choose_plan, whole
from pipeline.models import fp8 as fp8_models
from pipeline.models.layers import GatedMLP, Linear, RMSNorm

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
KIND = torch.bfloat16 if CUDA else torch.float32  # the interpreter cuts bfloat16 off
PROCESSORS = 132

needs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="the interpreted run has it")


@pytest.fixture(autouse=True)
def _kernels(_clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("VLM_BATCH_KERNELS", "triton")


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run here already")
def test_interpreted() -> None:
    """This file again, interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout


@pytest.mark.parametrize("rows", [1, 16, 24, 64, 100, 128, 192, 256, 384, 512])
@pytest.mark.parametrize(("columns", "depth"), [(3584, 18944), (3584, 3584), (4096, 640)])
def test_pieces_cover_the_depth_and_fill_the_device(rows: int, columns: int, depth: int) -> None:
    plan = choose_plan(rows, columns, depth, PROCESSORS, parts=True)
    if plan is None:
        assert rows > 64 or depth < 1024
        return
    width, tiles = fp8.piece_width(depth, plan.pieces), columns // plan.block_n
    assert (plan.pieces - 1) * width < depth <= plan.pieces * width
    assert columns % plan.block_n == 0
    assert tiles * -(-rows // plan.block_m) * plan.pieces > columns // 128 * -(-rows // 128)
    assert plan.pieces > 1


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "processors"),
    [
        (0, 3584, 18944, PROCESSORS),
        (513, 3584, 18944, PROCESSORS),  # prefill
        (17, 37888, 3584, PROCESSORS),  # the library's tiles fill the device
        (16, 3584, 1000, PROCESSORS),
        (16, 3600, 3584, PROCESSORS),
        (16, 3584, 18944, 0),  # no such device
    ],
)
def test_the_library_keeps_the_rest(rows: int, columns: int, depth: int, processors: int) -> None:
    for parts in (False, True):
        assert choose_plan(rows, columns, depth, processors, parts) is None


def test_what_no_norm_reads_comes_whole() -> None:
    plan = choose_plan(16, 4608, 3584, PROCESSORS, parts=False)
    assert plan is not None
    assert plan.pieces == 1


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_pieces_of_a_row_have_their_own_scales(pieces: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 640, device=DEVICE) * torch.logspace(-3, 3, 640, device=DEVICE)
    values, scale = fp8.quantize_rows_reference(x, pieces)
    assert scale.shape == (5, pieces)
    width = fp8.piece_width(640, pieces)
    for i, part in enumerate(x.split(width, 1)):
        found = values[:, i * width : (i + 1) * width].float() * scale[:, i : i + 1]
        assert ((found - part).abs().amax(1) / part.abs().amax(1)).max() < 0.04


@needs_kernels
@pytest.mark.parametrize("pieces", [1, 3])
def test_rows_in_pieces(pieces: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * 640, device=DEVICE)
    gated = swiglu.swiglu_reference(x)
    for found, expected in (
        (fp8.quantize_rows(x, pieces), fp8.quantize_rows_reference(x, pieces)),
        (swiglu.swiglu_fp8(x, pieces), fp8.quantize_rows_reference(gated, pieces)),
    ):
        torch.testing.assert_close(found.scale, expected.scale)
        # The interpreter loses the carry where float8 rounds up to a power of two.
        other = found.values.float() != expected.values.float()
        assert other.float().mean() < (0.002 if CUDA else 0.05)


@needs_kernels
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(("rows", "block_m"), [(5, 16), (40, 16), (33, 64)])
def test_product(rows: int, block_m: int, pieces: int) -> None:
    """As near to the exact product as one of whole rows; a row does not see the others."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, device=DEVICE, dtype=KIND) for s in ((rows, 1280), (256, 1280), (256,))
    )
    plan = Plan(128, block_m, pieces, 3, 4)
    b = fp8.quantize_rows_reference(weight)
    a = fp8.quantize_rows_reference(x, pieces)
    found = split_matmul.split_matmul(plan, *a, *b, bias, KIND)
    assert isinstance(found, split_matmul.Parts) == (pieces > 1)
    exact = x.double() @ weight.double().T + bias.double()
    plain = fp8.scaled_product(*fp8.quantize_rows_reference(x), *b, bias, KIND)
    errors = [(y.double() - exact).norm() for y in (whole(found), plain)]
    assert errors[0] <= 1.1 * errors[1]
    a.values.view(torch.uint8)[1:] = 0x30
    again = split_matmul.split_matmul(plan, *a, *b, bias, KIND)
    assert torch.equal(whole(again)[0], whole(found)[0])


@needs_kernels
@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_adds_the_parts(residual: bool) -> None:
    torch.manual_seed(0)
    parts = split_matmul.Parts(torch.randn(3, 5, 300, device=DEVICE), KIND)
    extra = torch.randn(5, 300, device=DEVICE, dtype=KIND) if residual else None
    weight = torch.randn(300, device=DEVICE, dtype=KIND)
    wide = parts.values.double().sum(0) + (extra.double() if extra is not None else 0)
    exact = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    plain, plain_total = rms_norm.rms_norm_reference(parts, weight, 1e-6, extra)
    normed, total = rms_norm.rms_norm(parts, weight, 1e-6, extra)
    assert normed.dtype == total.dtype == KIND
    for found, other, true in ((normed, plain, exact), (total, plain_total, wide)):
        assert (found.double() - true).norm() <= 1e-6 + 2 * (other.double() - true).norm()
    quantized, again = rms_norm.rms_norm_fp8(parts, weight, 1e-6, extra)
    assert torch.equal(again, total)
    assert quantized.values.shape == (5, 300)


@needs_kernels
def test_a_block_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP, cut in pieces, and the norm after it are as near to the exact ones as whole."""
    torch.manual_seed(0)

    class Block:
        norm = RMSNorm(torch.ones(256, device=DEVICE, dtype=KIND), 1e-6)
        mlp = GatedMLP(
            Linear(torch.randn(1280, 256, device=DEVICE, dtype=KIND) / 16),
            Linear(torch.randn(256, 640, device=DEVICE, dtype=KIND) / 16),
        )

    block, x = Block(), torch.randn(7, 256, device=DEVICE, dtype=KIND)
    exact = block.norm(block.mlp(x), x)[0]
    fp8_models.quantize_block(block, {}, parts=("mlp",))
    results = []
    for pieces in (1, 3):
        plan = Plan(128, 16, pieces, 3, 4)
        monkeypatch.setattr(
            fp8_models, "plan_for", lambda *a, plan=plan: plan if a[2] and plan.pieces > 1 else None
        )
        results.append(block.norm(block.mlp(x), x)[0])
    errors = [(y - exact).double().norm() for y in results]
    assert 0 < errors[1] <= 1.2 * errors[0]
