"""Dense attention by the library: a shape's first calls and its later ones agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.kernels import attention


@pytest.fixture(autouse=True)
def _forget() -> None:
    attention._work.clear()


def _shapes(*sizes: int) -> Iterator[Tensor]:
    """Queries and keys of one image of so many tokens each, without their values."""
    for size in sizes:
        yield torch.empty(1, 16, size, 80, device="meta")


def test_a_shape_is_familiar_when_preparing_for_it_would_have_paid() -> None:
    (photo,) = _shapes(3996)
    found = [attention._is_familiar(photo, photo) for _ in range(500)]
    assert 4 * 80 < found.index(True) < 4 * 128, "about the images that 40 ms are lost on"
    assert all(found[found.index(True) :])
    (other,) = _shapes(3992)
    assert not attention._is_familiar(other, other)


def test_small_images_need_more_calls() -> None:
    (small,) = _shapes(64)
    assert not any(attention._is_familiar(small, small) for _ in range(10_000))


def test_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SHAPES", 10)
    for tokens in _shapes(*range(1, 100)):
        attention._is_familiar(tokens, tokens)
        assert len(attention._work) <= 10


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
    for work in (0, int(attention.FAMILIAR)):
        attention._work[q.shape, k.shape, dtype] = work
        found = attention.dense_attention(q, k, v, mask=mask)
        assert (found - expected).abs().max() < tolerance
