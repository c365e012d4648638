"""The C kernels compared with double precision: values, odd sizes, allowed aliasing, threads, NaN and infinity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops import reference as references
from lorakit.ops.kernels import compiled, kernels_for
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary

KERNELS = compiled.kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason=f"no kernels: {compiled.describe()}")
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""Relative norm of the difference: sums in fp32; slightly above half a unit in the last place."""
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 31), (70, 577), (64, 64)], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def some(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def close(found: Tensor, truth: Tensor) -> None:
    assert found.isfinite().all()
    error = float((found.double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-30))
    assert error < BOUNDS[found.dtype], f"{error:.2e}"


def leaf(x: Tensor) -> Tensor:
    return x.double().requires_grad_()


@DTYPES
@SHAPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int], offset: float) -> None:
    x, dn, add = (some(*shape, dtype=dtype) for _ in range(3))
    w = some(shape[1], dtype=dtype) + 2
    n, again, dx, rstd = torch.empty_like(x), torch.empty_like(x), dn.clone(), torch.empty(shape[0], 1)
    KERNELS.rms_forward(x, w, 1e-5, offset, n, rstd)
    KERNELS.rms_recompute(x, w, offset, rstd, again)
    KERNELS.rms_backward(dn, x, w, offset, rstd, None, dx)
    exact = leaf(x)
    truth = references.norm(exact, Norm("rms", w.double(), None, 1e-5, offset))
    truth.backward(dn.double())
    truth = truth.detach()
    assert torch.equal(n, again)
    torch.testing.assert_close(
        rstd.double(), (exact.detach().square().mean(1, keepdim=True) + 1e-5).rsqrt(), rtol=1e-6, atol=0
    )
    error = float((n.double() - truth).norm() / truth.norm())
    assert error < 2 * BOUNDS[dtype]  # rounded before the weight too, as transformers has it
    bound = float(dn.double().norm() * rstd.max() * 4)  # if a row has one element, its gradient is almost zero
    assert float((dx.double() - exact.grad).norm()) < BOUNDS[dtype] * bound
    KERNELS.rms_backward(dx.copy_(dn), x, w, offset, rstd, add, dx)
    assert float((dx.double() - exact.grad - add.double()).norm()) < BOUNDS[dtype] * (
        bound + float(add.double().norm())
    )


def test_a_norm_rounds_where_transformers_rounds() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = some(200, 96, dtype=torch.bfloat16)
    n, rstd = torch.empty_like(x), torch.empty(200, 1)
    for module, offset in ((LlamaRMSNorm(96, 1e-6), 0.0), (Gemma2RMSNorm(96, 1e-6), 1.0)):
        torch.nn.init.normal_(module.weight, 1 - offset, 0.3)
        module.bfloat16()
        KERNELS.rms_forward(x, module.weight, 1e-6, offset, n, rstd)
        assert (n != module(x)).float().mean() < 1e-3  # a sum in another order may round differently


@DTYPES
@pytest.mark.parametrize("act", sorted(compiled.ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("count", [1, 33, 20_001])
def test_gates(dtype: torch.dtype, act: str, gated: bool, count: int) -> None:
    first, up, da = (some(1, count, dtype=dtype, scale=3) for _ in range(3))
    out, dup = torch.empty_like(first), torch.empty_like(first) if gated else None
    f = references.ACTIVATIONS[act]
    x, u = leaf(first), leaf(up)
    truth = f(x) * u if gated else f(x)
    truth.backward(da.double())
    KERNELS.gate(act, first, up if gated else None, out)
    close(out, truth)
    KERNELS.gate_backward(act, da, first, up if gated else None, da, dup)
    close(da, x.grad)
    if dup is not None:
        close(dup, u.grad)


@pytest.mark.parametrize("act", sorted(compiled.ACTIVATIONS))
def test_gates_of_large_numbers_and_of_none(act: str) -> None:
    x = torch.tensor([[-math.inf, -200.0, -90.0, 0.0, 90.0, 200.0, 3e38, math.nan]])
    out, grad = torch.empty_like(x), torch.ones_like(x)
    KERNELS.gate(act, x, None, out)
    assert out[0, 1:7].tolist() == pytest.approx([0, 0, 0, 90, 200, 3e38], abs=1e-20, rel=1e-6)
    assert out[0, 7].isnan()
    KERNELS.gate_backward(act, grad, x, None, grad, None)
    assert grad[0, 1:3].tolist() == pytest.approx([0, 0], abs=1e-20)
    assert grad[0, 4:6].tolist() == pytest.approx([1, 1])


@DTYPES
@pytest.mark.parametrize("rot", [16, 10])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_positions(dtype: torch.dtype, rot: int, rows: int) -> None:
    wide = some(2, 5, 3 * 16 + 7, dtype=dtype)
    x = wide[..., :48].view(2, 5, 3, 16)  # tokens further apart than the total width of their heads
    angle = torch.rand(rows, 5, rot) * 6
    cos, sin = (
        angle.cos().to(dtype),
        angle.sin().to(dtype),
    )  # any tables, not only those with equal halves  # prose-check: ok
    sin = sin.roll(1, -1)
    out = torch.empty(2, 5, 3, 16, dtype=dtype)
    KERNELS.rotate(x, cos, sin, False, out)
    exact = leaf(x.transpose(1, 2))
    truth = references.rotary(exact, Rotary(cos.double(), sin.double()))
    close(out.transpose(1, 2), truth)
    dy = some(2, 5, 3, 16, dtype=dtype)
    truth.backward(dy.transpose(1, 2).double())
    KERNELS.rotate(dy, cos, sin, True, dy)
    close(dy.transpose(1, 2), exact.grad)


@DTYPES
def test_softmax_of_a_masked_score_is_zero(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, -3e38, 0.0, -1e5, -200.0]], dtype=dtype).repeat(3, 7)
    KERNELS.softmax(scores, None, None)
    assert not scores[:, 1::5].any() and not scores[:, 3::5].any() and not scores[:, 4::5].any()
    assert scores.float().sum(-1).allclose(torch.ones(3), atol=1e-2)


@DTYPES
def test_softmax_of_what_a_row_sees(dtype: torch.dtype) -> None:
    scores = some(6, 8, 37, dtype=dtype, scale=4)
    low = torch.tensor([0, 3, 5, 36], dtype=torch.int32)
    high = torch.tensor([1, 20, 37, 37], dtype=torch.int32)
    target = torch.arange(37)
    seen = ((target >= low[:, None]) & (target < high[:, None])).repeat(2, 1)
    exact = scores.double().masked_fill(~seen, -math.inf).requires_grad_()
    truth = exact.softmax(-1)
    weights = scores.clone()
    KERNELS.softmax(weights, low, high)
    close(weights, truth)
    assert (weights == 0).logical_or(seen).all()
    ds = some(6, 8, 37, dtype=dtype)
    truth.backward(ds.double())
    KERNELS.softmax_backward(weights, ds)
    assert float((ds.double() - exact.grad).norm()) < 4 * BOUNDS[dtype] * float(exact.grad.norm())
    KERNELS.softmax(scores.copy_(exact.detach().nan_to_num(neginf=-9)), None, None)
    close(scores, exact.detach().nan_to_num(neginf=-9).softmax(-1))


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_cross_entropy(dtype: torch.dtype, scale: float) -> None:
    logits, labels, losses = some(5, 1003, dtype=dtype, scale=5), torch.randint(1003, (5,)), torch.empty(5)
    logits[0, 7], labels[0] = 300.0, 8  # a label whose probability is 0 in fp32
    exact = leaf(logits)
    truth = F.cross_entropy(exact * scale, labels, reduction="none")
    truth.sum().backward()
    before = logits.clone()
    KERNELS.cross_entropy(logits, labels, scale, False, losses)
    assert torch.equal(logits, before)
    KERNELS.cross_entropy(logits, labels, scale, True, losses)
    torch.testing.assert_close(losses.double(), truth, rtol=2e-6, atol=2e-6)
    close(logits, exact.grad / scale)


@DTYPES
@pytest.mark.parametrize("between", [(), (1,), (3,)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (31, 3, 577), (96, 16, 64), (64, 6, 200), (50, 64, 33)], ids=str)
def test_rows_with_factors_of_their_own(
    dtype: torch.dtype, between: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    width, r, out = sizes
    x, y = (some(7, *between, n, dtype=dtype) for n in (width, out))
    A, Bt = some(4, r, width, dtype=dtype, scale=width**-0.5), some(4, r, out, dtype=dtype)
    index = torch.tensor([2, -1, 0, 3, 3, -1, 2])
    before, truth = y.clone(), y.double()
    for i, k in enumerate(index.tolist()):
        if k >= 0:
            truth[i] += (x[i].double() @ A[k].double().t()) @ Bt[k].double()
    KERNELS.own.add_per_row(x, A, Bt, index, y)
    assert torch.equal(y[index < 0], before[index < 0])
    error = float((y.double() - truth).norm() / truth.norm())
    assert error < 2 * BOUNDS[dtype]  # the low-rank activation is rounded, then the sum
    if dtype == torch.bfloat16:  # where the matmul methods round
        i, k = 3, 3
        h = (x[i].float() @ A[k].float().t()).bfloat16()
        plain = (before[i].float() + h.float() @ Bt[k].float()).bfloat16()
        assert (y[i] != plain).float().mean() < 0.05  # a sum in another order may round differently


def test_a_number_that_is_none_stays_so() -> None:
    for dtype in BOUNDS:
        x, out, rstd = some(2, 40, dtype=dtype), torch.empty(2, 40, dtype=dtype), torch.empty(2, 1)
        x[0, 3] = math.nan
        KERNELS.rms_forward(x, torch.ones(40, dtype=dtype), 1e-5, 0.0, out, rstd)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
        KERNELS.softmax(out.copy_(x), None, None)
        assert out[0].isnan().all()
        KERNELS.own.add_per_row(
            x, torch.ones(1, 2, 40, dtype=dtype), x[None], torch.zeros(2, dtype=torch.int64), out.zero_()
        )
        assert out[0].isnan().all()
        losses = torch.empty(2)
        KERNELS.cross_entropy(out.copy_(x), torch.tensor([1, 1]), 1.0, True, losses)
        assert losses[0].isnan()
        assert losses[1].isfinite()


def test_threads_change_no_bit() -> None:
    x, w = some(300, 96, dtype=torch.bfloat16), some(96, dtype=torch.bfloat16)
    stack = some(3, 5, 96, dtype=torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            n, rstd, dx, a = torch.empty_like(x), torch.empty(300, 1), torch.empty_like(x), torch.empty_like(x)
            KERNELS.rms_forward(x, w, 1e-5, 0.0, n, rstd)
            KERNELS.rms_backward(n, x, w, 0.0, rstd, n, dx)
            KERNELS.gate("silu", x, n, a)
            s = x.clone()
            KERNELS.softmax(s, None, None)
            y = torch.zeros_like(x)
            KERNELS.own.add_per_row(x, stack, stack, torch.arange(300) % 3, y)
            found.append((n, dx, a, s, y))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_they_are_for_plain_tensors_of_their_dtypes() -> None:
    x = torch.ones(4, 4)
    assert kernels_for(x) is compiled.kernels()
    assert kernels_for(x, None, torch.ones(2)) is compiled.kernels()
    assert kernels_for(x.double()) is None
    assert kernels_for(x, torch.ones(4).bfloat16()) is None
    assert kernels_for(x.t()[1:]) is None
    assert kernels_for(x.t()[1:], strided=True) is compiled.kernels()
    assert kernels_for(x, x.t()[1:]) is None
    assert kernels_for(torch.empty(4, device="meta")) is None
    assert torch.func.vmap(lambda row: row * (1.0 if kernels_for(row) is None else 2.0))(x).sum() == 16
    with torch._subclasses.FakeTensorMode():
        assert kernels_for(torch.empty(4)) is None
