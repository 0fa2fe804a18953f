"""The attention kernels compile for GPUs and fit their shared memory; no GPU is needed for that.

Heads of 256 values (Gemma 3) are the widest: with little shared memory they take smaller blocks.
"""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pipeline.kernels import (  # noqa: E402
    cascade_attention,
    decode_attention,
    decode_float8,
    head_norm,
    prefill_attention,
    swiglu,
)

BLOCK_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}  # of compute capabilities, ten times
HALF = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*bf16"}
PREFILL = HALF | {
    "tiles_ptr": "*i32", "table_ptr": "*i32", "ahead_ptr": "*i32", "head_stride": "i64",
    "q_stride": "i32", "scale": "fp32",
}  # fmt: skip
DECODE = HALF | {
    "seg_ptr": "*i32", "part_ptr": "*fp32", "stat_ptr": "*fp32", "head_stride": "i64",
    "scale": "fp32", "num_splits": "i32", "num_parts": "i32",
}  # fmt: skip
CASCADE = HALF | {
    "items_ptr": "*i32", "part_ptr": "*fp32", "stat_ptr": "*fp32", "head_stride": "i64",
    "scale": "fp32", "num_parts": "i32", "first_part": "i32",
}  # fmt: skip
FLOAT8 = {
    "k_ptr": "*fp8e4nv", "v_ptr": "*fp8e4nv", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
}  # fmt: skip
PAIRS = DECODE | FLOAT8 | {"k_ptr": "*i16", "v_ptr": "*i16", "num_rows": "i32"}
HEADS = {"x_ptr": "*bf16", "weight_ptr": "*fp32", "stride": "i32", "eps": "fp32"}
GATED = {"in_ptr": "*bf16", "out_ptr": "*bf16", "width": "i32"}


def shared_bytes(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    **options: int,
) -> int:
    """Compile as a launch with aligned tensors would; return the bytes of a block."""
    names = kernel.arg_names
    constants = {
        n: None for n in names if n.endswith("scale_ptr") and n not in arguments
    } | constants
    arguments = {n: kind for n, kind in arguments.items() if n in names}
    signature = {n: arguments.get(n, "constexpr") for n in names}
    aligned = [n for n in arguments if arguments[n].startswith("*") or n.endswith("_stride")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return int(triton.compile(source, target=target, options=options).metadata.shared)


@pytest.mark.parametrize(
    ("capability", "keys", "stages"), [(90, prefill_attention.BLOCK_KV, 2), (89, 32, 1)]
)
def test_prefill_of_wide_heads(capability: int, keys: int, stages: int) -> None:
    constants = {
        "HQ": 8, "GROUP": 2, "DIM": 256, "BLOCK_D": 256, "BLOCK_M": prefill_attention.BLOCK_Q,
        "BLOCK_N": keys, "WINDOW": 1024, "SOFTCAP": 50.0, "SPANS": True,
        "WIDTH": prefill_attention.TABLE_WIDTH,
    }  # fmt: skip
    kernel: Any = prefill_attention._prefill_kernel
    options = {"num_warps": 8, "num_stages": stages}
    found = shared_bytes(kernel, PREFILL, constants, capability, **options)
    assert found <= BLOCK_BYTES[capability]
    wide = BLOCK_BYTES[capability] >= prefill_attention.WIDE_BYTES
    assert wide == (keys == prefill_attention.BLOCK_KV)


def test_decode_of_wide_heads() -> None:
    constants = {
        "HQ": 8, "HK": 4, "DIM": 256, "SEGMENTS": 3, "ROWS": 16, "BLOCK_D": 256,
        "BLOCK": decode_attention.BLOCK_KV, "WINDOW": 1024, "SOFTCAP": 0.0,
    }  # fmt: skip
    kernel: Any = decode_attention._decode_kernel
    found = shared_bytes(kernel, DECODE, constants, 89, num_warps=4, num_stages=2)
    assert found <= BLOCK_BYTES[89]


@pytest.mark.parametrize(("capability", "stages"), [(90, 2), (89, 1)])
def test_cascade_of_wide_heads(capability: int, stages: int) -> None:
    constants = {
        "HQ": 8, "GROUP": 2, "DIM": 256, "LANES": cascade_attention.lanes_per_item(8, 4),
        "ROWS": cascade_attention.ROWS, "BLOCK_D": 256, "BLOCK": decode_attention.BLOCK_KV,
        "SOFTCAP": 0.0,
    }  # fmt: skip
    kernel: Any = cascade_attention._shared_kernel
    found = shared_bytes(kernel, CASCADE, constants, capability, num_warps=4, num_stages=stages)
    assert found <= BLOCK_BYTES[capability]


@pytest.mark.parametrize("capability", [90, 89])
@pytest.mark.parametrize("dim", [128, 256])
def test_decode_of_float8(dim: int, capability: int) -> None:
    """Three programs fit the shared memory of a multiprocessor, as in bfloat16."""
    wide = dim > 128
    constants = {
        "HQ": 28, "HK": 4, "DIM": dim, "SEGMENTS": 3, "ROWS": 16, "BLOCK_D": dim, "WINDOW": 0,
        "BLOCK": decode_float8.WIDE_BLOCK if wide else decode_float8.BLOCK, "SOFTCAP": 0.0,
        "ASM": True,
    }  # fmt: skip
    stages = decode_float8.WIDE_STAGES if wide else decode_float8.STAGES
    options = {"num_warps": decode_float8.WARPS, "num_stages": stages}
    kernel: Any = decode_float8._decode_kernel
    found = shared_bytes(kernel, PAIRS, constants, capability, **options)
    assert 3 * (found + 1024) <= 233_472
    assert found <= BLOCK_BYTES[capability]


@pytest.mark.parametrize(
    ("capability", "dim", "stages"), [(90, 128, 3), (90, 256, 2), (89, 256, 1)]
)
def test_cascade_of_float8(capability: int, dim: int, stages: int) -> None:
    constants = {
        "HQ": 8, "GROUP": 2, "DIM": dim, "LANES": cascade_attention.lanes_per_item(8, 4),
        "ROWS": cascade_attention.ROWS, "BLOCK_D": dim, "BLOCK": decode_attention.BLOCK_KV,
        "SOFTCAP": 0.0,
    }  # fmt: skip
    kernel: Any = cascade_attention._shared_kernel
    options = {"num_warps": 4, "num_stages": stages}
    found = shared_bytes(kernel, CASCADE | FLOAT8, constants, capability, **options)
    assert found <= BLOCK_BYTES[capability]


def test_head_norm_and_gate() -> None:
    norm: Any = head_norm._norm_heads_kernel
    constants = {"NUM_HEADS": 12, "DIM": 256, "ROWS": head_norm.HEADS_AT_ONCE, "BLOCK": 256}
    assert shared_bytes(norm, HEADS, constants, 90) <= BLOCK_BYTES[90]
    gate: Any = swiglu._gated_kernel
    constants = {"GELU": True, "BLOCK": swiglu.BLOCK}
    assert shared_bytes(gate, GATED, constants, 90) <= BLOCK_BYTES[90]
