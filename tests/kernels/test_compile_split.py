"""The tiles of `split_matmul` compile for a Hopper to its matrix units and fit as often as told."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pipeline.kernels.split_matmul import (  # noqa: E402
    PART_TILES,
    WHOLE_TILES,
    Tile,
    _split_kernel,
)

SHARED = 233_472  # bytes of a multiprocessor, of which each program takes 1024 more than it asks
TILES = [(tile, 4) for tile in PART_TILES.values()] + [(t, 1) for t in WHOLE_TILES.values()]


@pytest.mark.parametrize(("tile", "pieces"), TILES)
def test_a_tile(tile: Tile, pieces: int) -> None:
    kernel: Any = _split_kernel
    names = kernel.arg_names
    constants = {
        "HAS_BIAS": True,
        "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_K": 128,
    }  # fmt: skip
    kinds = {
        "a": f"tensordesc<fp8e4nv[{tile.block_m}, 128]>",
        "b": f"tensordesc<fp8e4nv[{tile.block_n}, 128]>",
        "bias_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32",
        "out_ptr": "*bf16" if pieces == 1 else "*fp32",
    }  # fmt: skip
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n in ("columns", "depth")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert (made.metadata.shared + 1024) * tile.resident <= SHARED
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "cp.async.bulk.tensor" in made.asm["ptx"]
