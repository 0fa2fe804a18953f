"""Dense attention by the library: a shape's first calls and its later ones agree."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.kernels import attention


@pytest.fixture(autouse=True)
def _forget() -> None:
    attention._calls.clear()


def test_a_shape_is_familiar_after_many_calls() -> None:
    found = [attention._is_familiar((1, 2), "a") for _ in range(attention.FAMILIAR + 1)]
    assert found == [False] * attention.FAMILIAR + [True]
    assert not attention._is_familiar((1, 3), "a")


def test_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SHAPES", 10)
    for length in range(100):
        attention._is_familiar(length)
        assert len(attention._calls) <= 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_are_right(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    packed = torch.randn(2 * 333, 12, 80, device="cuda", dtype=dtype)
    q, k, v = (t.unflatten(0, (2, 333)).transpose(1, 2) for t in packed.split(4, dim=1))
    mask = torch.rand(333, 333, device="cuda") < 0.5 if masked else None
    wide = (t.float() for t in (q, k, v))
    expected = functional.scaled_dot_product_attention(*wide, mask)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for calls in (0, attention.FAMILIAR):
        attention._calls[(q.shape, k.shape, dtype)] = calls
        found = attention.dense_attention(q, k, v, mask=mask)
        assert (found - expected).abs().max() < tolerance
