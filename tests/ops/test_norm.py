"""RMS norm and layer norm with frozen weights: equal to the formulas, and rounded as in transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.ops import adapted
from lorakit.ops.norm import Norm, normalize
from lorakit.ops.reference import norm as reference

D = torch.float64
WIDTH = 7
EPS = 1e-3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(name: str, dtype: torch.dtype = D, width: int = WIDTH) -> Norm:
    g = torch.Generator().manual_seed(3)
    w, b = (torch.randn(width, generator=g, dtype=D).to(dtype) for _ in range(2))
    return {
        "rms": Norm("rms", w, None, EPS),
        "rms from zero": Norm("rms", w, None, EPS, 1.0),
        "layer": Norm("layer", w, b, EPS),
        "layer without bias": Norm("layer", w, None, EPS),
    }[name]


NAMES = ["rms", "rms from zero", "layer", "layer without bias"]


def both(y: Tensor, x: Tensor) -> list[Tensor]:
    weights = torch.sin(torch.arange(y.numel(), dtype=D)).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), x)]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", ["rms", "rms from zero"])
def test_rms_norm_is_the_formula(name: str) -> None:
    """Compute formula (76), with an explicit gradient."""
    norm, x = made(name), torch.randn(3, WIDTH, dtype=D, requires_grad=True)
    gain = norm.weight + norm.offset
    y = normalize(x, norm)
    g = torch.randn(3, WIDTH, dtype=D)
    (found,) = torch.autograd.grad(y, x, g)
    with torch.no_grad():
        rho = (x.square().mean(1, keepdim=True) + EPS) ** -0.5
        assert torch.allclose(y, x * rho * gain, rtol=1e-12, atol=1e-14)
        dx = rho * g * gain - rho**3 * x * (g * gain * x).mean(1, keepdim=True)
        assert torch.allclose(found, dx, rtol=1e-12, atol=1e-14)


def test_layer_norm_is_the_formula() -> None:
    """Compute formula (77), with an explicit gradient."""
    norm, x = made("layer"), torch.randn(3, WIDTH, dtype=D, requires_grad=True)
    y = normalize(x, norm)
    g = torch.randn(3, WIDTH, dtype=D)
    (found,) = torch.autograd.grad(y, x, g)
    with torch.no_grad():
        rho = (x.var(1, correction=0, keepdim=True) + EPS) ** -0.5
        hat, e = (x - x.mean(1, keepdim=True)) * rho, g * norm.weight
        assert torch.allclose(y, hat * norm.weight + norm.bias, rtol=1e-12, atol=1e-14)
        dx = rho * (e - e.mean(1, keepdim=True) - hat * (e * hat).mean(1, keepdim=True))
        assert torch.allclose(found, dx, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3, WIDTH), (1, WIDTH), (WIDTH,), (0, WIDTH)])
def test_it_is_the_reference(name: str, shape: tuple[int, ...]) -> None:
    norm, x = made(name), torch.randn(shape, dtype=D, requires_grad=True)
    for one, other in zip(both(normalize(x, norm), x), both(reference(x, norm), x), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    if x.numel():
        assert torch.autograd.gradcheck(lambda t: normalize(t, norm), (x,))


@pytest.mark.parametrize("many", [1, 20, 1 << 20])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes(name: str, dtype: torch.dtype, bound: float, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value equals the reference bit for bit (in fp32: to 1e-6); the gradient is at least as close to float64."""
    monkeypatch.setattr(adapted, "SLAB", many)
    norm, x = made(name, dtype), torch.randn(33, WIDTH).to(dtype).requires_grad_()
    double = {key: None if (t := getattr(norm, key)) is None else t.double() for key in ("weight", "bias")}
    exact = x.detach().double().requires_grad_()
    truth = both(reference(exact, replace(norm, **double)), exact)
    found, plain = both(normalize(x, norm), x), both(reference(x, norm), x)
    assert [t.dtype for t in found] == [dtype, dtype]
    assert torch.equal(found[0], plain[0]) or dtype == torch.float32
    for one, other, true in zip(found, plain, truth, strict=True):
        assert error(one, true) <= 1.5 * error(other, true) + bound


def test_the_values_are_those_of_transformers_to_the_bit() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    x = torch.randn(50, 64).bfloat16()
    for kind, offset in ((LlamaRMSNorm, 0.0), (T5LayerNorm, 0.0), (Gemma2RMSNorm, 1.0)):
        module = kind(64, eps=1e-5).bfloat16().requires_grad_(False)
        module.weight.normal_()
        assert torch.equal(module(x), normalize(x, Norm("rms", module.weight, None, 1e-5, offset)))
    layer = nn.LayerNorm(64).bfloat16().requires_grad_(False)
    layer.weight.normal_()
    assert torch.equal(layer(x), normalize(x, Norm("layer", layer.weight, layer.bias, layer.eps)))


@pytest.mark.parametrize("name", NAMES)
def test_the_halves(name: str) -> None:
    """`recompute` gives the bits of `forward`; inputs are not modified; statistics are in fp32."""
    norm = made(name, torch.bfloat16)
    x, dn = torch.randn(9, WIDTH).bfloat16(), torch.randn(9, WIDTH).bfloat16()
    copies = x.clone(), dn.clone()
    n, stats = norm.forward(x)
    assert torch.equal(norm.recompute(x, stats), n)
    assert all(s.dtype == torch.float32 and s.shape == (9, 1) for s in stats)
    norm.backward(dn, x, stats)
    assert torch.equal(x, copies[0])
    assert torch.equal(dn, copies[1])


def test_strided_input_and_gradient() -> None:
    norm, wide = made("rms"), torch.randn(4, WIDTH, 6, dtype=D, requires_grad=True)
    x = wide.transpose(1, 2)
    for one, other in zip(both(normalize(x, norm).mT, wide), both(reference(x, norm).mT, wide), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "numbers"), [("rms", 1), ("layer", 2)])
def test_what_is_saved(name: str, numbers: int) -> None:
    x = torch.randn(5, 6, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        normalize(x, made(name, torch.bfloat16))
        assert sum(t.nbytes for t in saved) == 30 * WIDTH * 2 + numbers * 30 * 4
        assert saved[0].data_ptr() == x.data_ptr()
        saved.clear()
        with torch.no_grad():
            normalize(x, made(name, torch.bfloat16))
        normalize(x.detach(), made(name, torch.bfloat16))
        assert not saved


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_trained_norm_is_refused(name: str) -> None:
    norm = made("layer")
    getattr(norm, name).requires_grad_()
    x: Any = torch.randn(3, WIDTH, dtype=D)
    with pytest.raises(ValueError, match=rf"norm\'s {name} \(7,\) requires a gradient, .*; freeze it"):
        normalize(x, norm)
    with torch.no_grad():
        normalize(x, norm)
