"""Gemma's norms and gate: the Triton kernels equal their references, interpreted or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.kernels.head_norm import norm_heads, norm_heads_reference
from pipeline.kernels.rms_norm import rms_norm, rms_norm_reference
from pipeline.kernels.swiglu import geglu, geglu_reference


def check(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loose = {"rtol": 1.6e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    gates = torch.randn(7, 2, 1100, device=device, dtype=dtype).flatten(1)
    torch.testing.assert_close(geglu(gates), geglu_reference(gates), **loose)
    for wide in (torch.float32, dtype):
        x, residual = torch.randn(2, 5, 200, device=device, dtype=dtype)
        weight = torch.randn(200, device=device, dtype=wide)
        for found, expected in zip(
            rms_norm(x, weight, 1e-6, residual),
            rms_norm_reference(x, weight, 1e-6, residual),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, **loose)
        qkv = torch.randn(6, 23, 24, device=device, dtype=dtype)
        weight = torch.randn(19, 24, device=device, dtype=wide)
        expected, rest = norm_heads_reference(qkv[:, :19], weight, 1e-6), qkv[:, 19:].clone()
        norm_heads(qkv[:, :19], weight, 1e-6)
        torch.testing.assert_close(qkv[:, :19], expected, **loose)
        torch.testing.assert_close(qkv[:, 19:], rest)


def test_interpreted_kernels(root: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLM_BATCH_KERNELS": "triton"}
    command = "import torch; from tests.kernels.test_gemma_kernels import check;"
    command += "check('cpu', torch.float32); check('cpu', torch.bfloat16)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype)
