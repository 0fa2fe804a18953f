"""The kernels of mixtures and latent attention compile for an H100 without one, at Kimi-VL's sizes.

What the interpreter cannot see: shapes that the matrix units take, and shared memory.
"""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.kernels import grouped_gemm, mla_attention, mla_pack, router

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
SHARED_BYTES = 227 << 10  # of one program on an H100
LATENT = {"NUM_HEADS": 16, "ROPE": 64, "RANK": 512, "ROWS": 16, "BLOCK_R": 64, "BLOCK_L": 512}
HALF, WIDE, EIGHT, INT = "*bf16", "*fp32", "*fp8e4nv", "*i32"
DIVISIBLE = ("hidden", "inner", "q_stride")  # numbers that are multiples of 16


def shared_bytes(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], **how: int) -> int:
    """Compile for compute capability 9.0; the shared memory that one program takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in DIVISIBLE]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return build(source, target=GPUTarget("cuda", 90, 32), options=how).metadata.shared


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_experts(rows: int, scaled: bool) -> None:
    kind, scale = (EIGHT, {}) if scaled else (HALF, {"x_scale_ptr": None, "scale_ptr": None})
    kinds = dict.fromkeys(("x_ptr", "weight_ptr"), kind)
    kinds |= dict.fromkeys(("x_scale_ptr", "scale_ptr", "by_ptr"), WIDE)
    kinds |= {"out_ptr": HALF, "order_ptr": INT, "blocks_ptr": INT}
    tile = {"SCALED": scaled, "BLOCK_M": rows, "BLOCK_K": 128 if scaled else 64} | scale
    how = {"num_warps": 4 if rows <= 64 else 8, "num_stages": 3}
    first = tile | {"TOP": 6, "BLOCK_N": 64}
    assert shared_bytes(grouped_gemm._gate_up_kernel, kinds, first, **how) <= SHARED_BYTES
    second = tile | {"BLOCK_N": 128}
    assert shared_bytes(grouped_gemm._down_kernel, kinds, second, **how) <= SHARED_BYTES


@pytest.mark.parametrize("kind", [HALF, WIDE], ids=["bf16", "f32"])
def test_latent_attention(kind: str) -> None:
    wide = kind == WIDE
    kinds = dict.fromkeys(("q_ptr", "cache_ptr", "out_ptr", "part_ptr"), kind)
    kinds |= {"seg_ptr": INT, "blocks_ptr": INT, "table_ptr": INT, "stat_ptr": WIDE}
    kinds["scale"] = "fp32"
    block = 16 if wide else mla_attention.BLOCK_KV
    decode = LATENT | {"SEGMENTS": 3, "BLOCK": block}
    kernel = mla_attention._decode_kernel
    assert shared_bytes(kernel, kinds, decode, num_warps=8, num_stages=3) <= SHARED_BYTES
    tokens = 1 if wide else mla_attention.TOKENS
    prefill = LATENT | {"WIDTH": mla_attention.TABLE_WIDTH, "BLOCK_N": block, "TOKENS": tokens}
    prefill["PER_BLOCK"] = mla_attention.BLOCK_Q // tokens
    how = {"num_warps": 4 if wide else 8, "num_stages": 1 if wide else 2}
    assert shared_bytes(mla_attention._prefill_kernel, kinds, prefill, **how) <= SHARED_BYTES


def test_small_steps() -> None:
    kinds = dict.fromkeys(("packed_ptr", "q_ptr", "row_ptr", "weight_ptr", "cache_ptr"), HALF)
    kinds |= dict.fromkeys(("cos_ptr", "sin_ptr", "logits_ptr", "bias_ptr", "weights_ptr"), WIDE)
    kinds |= dict.fromkeys(("chosen_ptr", "order_ptr", "blocks_ptr"), INT)
    kinds |= {"places_ptr": "*i64", "eps": "fp32", "scaling": "fp32"}
    pack = {"HEADS": 16, "ROPE": 64, "RANK": 512, "BLOCK_H": 16, "BLOCK_R": 64, "BLOCK_L": 512}
    turn = {"HEADS": 16, "HALF": 32, "DIM": 576, "BLOCK_H": 32, "BLOCK_R": 32, "BLOCK_L": 512}
    choose = {"EXPERTS": 72, "TOP": 6, "TINY": router.TINY, "ROWS": 16, "BINS": 128, "SLOTS": 8}
    choose |= {"SIGMOID": True, "BIASED": True, "NORMALISED": True}
    sort = {"BINS": 128, "CHUNK": grouped_gemm.LONGEST_CHUNK}
    for kernel, constants in (
        (mla_pack._pack_kernel, pack),
        (mla_pack._turn_kernel, turn),
        (router._choose_kernel, choose),
        (grouped_gemm._sort_kernel, sort),
    ):
        assert shared_bytes(kernel, kinds, constants, num_warps=8) <= SHARED_BYTES
