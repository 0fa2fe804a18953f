"""The linear map equals the exact product on a CPU, whichever library computes it."""

from __future__ import annotations

import pytest
import torch

from pipeline.kernels.linear import linear


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (300,), (3, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 96), torch.randn(40, 96)
    added = torch.randn(40) if bias else None
    wanted = x.double() @ weight.double().T + (added.double() if added is not None else 0)
    found = linear(x, weight, added)
    assert found.dtype == torch.float32
    assert found.shape == (*shape, 40)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_strided_inputs_and_slices_of_weights() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(96, 50).t(), torch.randn(80, 96)[20:60]
    torch.testing.assert_close(linear(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_other_types_go_the_plain_way() -> None:
    x, weight = torch.randn(20, 32).bfloat16(), torch.randn(8, 32).bfloat16()
    torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight))


def test_gradients_still_flow() -> None:
    x = torch.randn(20, 32, requires_grad=True)
    linear(x, torch.randn(8, 32)).sum().backward()
    assert x.grad is not None
