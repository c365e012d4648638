"""Activations and their gradients: equal to autograd in every dtype, in place and slab by slab."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakit.ops import adapted
from lorakit.ops import reference as references
from lorakit.ops.activation import ACTIVATIONS, activation, gelu_tanh

D = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def of_autograd(name: str, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = references.ACTIVATIONS[name](x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def fused(name: str, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    act = activation(name)
    return act.value(x, torch.empty_like(x)), act.gradient(dy, x, torch.empty_like(x))


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_the_sigmoid_form_is_the_formula() -> None:
    """Compute formula (78), to compare it with the common tanh form."""
    x = torch.linspace(-9, 9, 37, dtype=D).view(1, -1)
    a = 2 * math.sqrt(2 / math.pi)
    y = gelu_tanh(x, torch.empty_like(x))
    assert torch.allclose(y, x / (1 + torch.exp(-a * (x + 0.044715 * x**3))), rtol=1e-12, atol=1e-15)
    assert torch.allclose(y, x / 2 * (1 + torch.tanh(a / 2 * (x + 0.044715 * x**3))), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("many", [1, 20, 1 << 20])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_is_the_reference(name: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "SLAB", many)
    x, dy = torch.randn(5, 7, dtype=D) * 3, torch.randn(5, 7, dtype=D)
    x[0, 0] = 0
    for one, other in zip(fused(name, dy, x), of_autograd(name, dy, x), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)
    other = of_autograd(name, dy, x)[1]
    act = activation(name)
    assert act.gradient(dy, x, dy) is dy
    assert torch.allclose(dy, other, rtol=1e-12, atol=1e-13)
    columns = torch.randn(5, 14, dtype=D)[:, ::2]
    for one, other in zip(fused(name, dy, columns), of_autograd(name, dy, columns), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)
    value = act.value(x, torch.empty_like(x))
    assert torch.equal(act.value(x, x), value)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_narrow_dtypes(name: str, dtype: torch.dtype, bound: float) -> None:
    """The error from float64 is at most 1.5 times torch's own, plus `bound`."""
    x, dy = (torch.randn(40, 50) * 3).to(dtype), torch.randn(40, 50).to(dtype)
    found, plain = fused(name, dy, x), of_autograd(name, dy, x)
    for one, other, true in zip(found, plain, of_autograd(name, dy.double(), x.double()), strict=True):
        assert one.dtype == dtype
        assert error(one, true) <= 1.5 * error(other, true) + bound


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_out(name: str) -> None:
    """No NaN if the exponential overflows, and correct limits."""
    x = torch.tensor([[-60000.0, -100, 100, 60000]])
    for dtype in (torch.float32, torch.bfloat16):
        y, dx = fused(name, torch.ones(1, 4, dtype=dtype), x.to(dtype))
        assert torch.allclose(y.float(), x.clamp_min(0).to(dtype).float())
        assert torch.allclose(dx.float(), torch.tensor([[0.0, 0, 1, 1]]))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation 'mish'; available: silu, gelu, gelu_tanh"):
        activation("mish")
