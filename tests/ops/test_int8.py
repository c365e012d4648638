"""Int8 matmuls: quantization in C equals the plain one bit for bit, and the fused operations equal their reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.machine import Machine, this_machine
from lorakit.ops import int8, int8_weight, reference
from lorakit.ops.activation import activation
from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.int8 import Int8Inputs
from lorakit.ops.int8_weight import Int8Weight, input_scales, quantize_rows, quantize_weight
from lorakit.ops.kernels import building, compiled, kernels_for
from lorakit.ops.linear import Group, linears
from lorakit.ops.mlp import Form, mlp

KERNELS = compiled.kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason=f"no kernels: {compiled.describe()}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ROWS = pytest.mark.parametrize("rows", [1, 3, 21])
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Largest difference, relative to the largest value; the reference in bf16 rounds each term of a sum."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(31 * seed + sum(shape)))


def activations(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return rows with two channels of large values."""
    x = normal(rows, width, seed=seed)
    x[:, 1] *= 300
    x[:, width // 2] *= 50
    return x.to(dtype)


def weights(outs: Sequence[int], width: int, dtype: torch.dtype, kept: int = 3) -> list[Int8Weight]:
    """Return int8 weights that share an input."""
    dense = [normal(out, width, seed=number).to(dtype) / width**0.5 for number, out in enumerate(outs)]
    gain, left_out = input_scales(activations(64, width, dtype).abs().amax(0), dense, kept)
    return [quantize_weight(W, gain, left_out) for W in dense]


def sites(
    outs: Sequence[int], width: int, dtype: torch.dtype, ranks: Sequence[int], p: float = 0.0, kept: int = 3
) -> list[Adapted]:
    group = []
    for number, (W, r) in enumerate(zip(weights(outs, width, dtype, kept), ranks, strict=True)):
        A, B = (normal(*shape, seed=5 + number).requires_grad_() for shape in ((r or 1, width), (len(W.q), r or 1)))
        bias = normal(len(W.q), seed=9).to(dtype) if number % 2 == 0 else None
        group.append(Adapted(W, bias, LowRank(A, B, 0.5, p) if r else None))
    return group


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    apart = (one.double() - other.double()).abs().max()
    return bool(apart <= BOUND[dtype] * other.abs().max())


@needs_kernels
@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 64), (33, 577)])
def test_quantization_in_c_has_the_bits_of_the_plain_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, factors = activations(*shape, dtype), normal(shape[1], seed=2).abs()
    factors[0] = 0
    kept = torch.tensor([shape[1] - 1, 0, 1])
    q, scale, columns = int8._quantized(x, factors, kept)
    assert torch.equal(columns, x[:, kept]) and not int8._quantized(x, factors).kept.numel()
    expected, of_rows = quantize_rows(x.float() * factors)
    assert torch.equal(q, expected)
    assert torch.equal(scale, of_rows)


@needs_kernels
@needs_kernels
def test_the_reciprocal_of_a_scale_is_rounded_once() -> None:
    """Two of these elements differed by one level when PyTorch multiplied by the rounded reciprocal of the maximum."""
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(int8._quantized(x, torch.ones(64))[0], quantize_rows(x)[0])


def test_ties_are_rounded_to_even_and_rows_without_values_to_zero() -> None:
    levels = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0])
    x = torch.stack([levels, torch.zeros(7), levels * 2.0**-140])
    q, scale, _ = int8._quantized(x, torch.ones(7))
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2, -127]
    assert not q[1:].any()
    assert torch.equal(q, quantize_rows(x)[0])
    assert scale[:2].tolist() == [1.0, 0.0]


@dtypes
def test_a_row_with_a_nan_stays_visible(dtype: torch.dtype) -> None:
    (W,) = weights([5], 8, dtype)
    x = activations(3, 8, dtype)
    x[1, 3] = torch.nan
    y = int8.output(Int8Inputs(x), W)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@dtypes
@ROWS
@pytest.mark.parametrize("ranks", [(2, 3, 1), (2, 0, 3), (0, 0, 0)], ids=["all adapted", "one bare", "bare"])
@pytest.mark.parametrize("kept", [0, 3])
def test_a_group_equals_its_reference_in_value_and_gradient(
    rows: int, ranks: Sequence[int], kept: int, dtype: torch.dtype
) -> None:
    group = sites([18, 7, 40], 37, dtype, ranks, kept=kept)
    results = []
    for function in (linears, reference.linear):
        x = activations(rows, 37, dtype, seed=1).requires_grad_()
        ys = function(x, group)
        gradients = [normal(*y.shape, seed=3 + number).to(dtype) for number, y in enumerate(ys)]
        inputs = [x, *(t for t in factors(group) if t is not None)]
        results.append([*ys, *torch.autograd.grad(list(ys), inputs, gradients)])
    assert all(close(one, other, dtype) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_changes_no_bit(default: torch.dtype) -> None:
    group = sites([128, 64], 192, torch.bfloat16, (4, 0))
    x = activations(70, 192, torch.bfloat16).requires_grad_()
    dys = [normal(70, 128, seed=3).bfloat16(), normal(70, 64, seed=4).bfloat16()]

    def results() -> list[Tensor]:
        int8.why_no_int8_matmuls.cache_clear()
        ys = linears(x, group)
        inputs = [x, *(t for t in factors(group) if t is not None)]
        return [*ys, *torch.autograd.grad(list(ys), inputs, dys)]

    expected = results()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@dtypes
def test_the_kernels_equal_pytorch_operations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    group = weights([18, 7], 37, dtype)
    x, h, B = activations(21, 37, dtype), normal(21, 3).to(dtype), normal(18, 3).to(dtype)
    dys = [(normal(21, len(W.q)).to(dtype), W) for W in group]
    plus = normal(21, 37, seed=4).to(dtype)

    def both() -> list[Tensor]:
        bias = normal(18, seed=2).to(dtype)
        return [int8.output(Int8Inputs(x), group[0], bias, h, B), int8.input_gradient(dys, plus.clone())]

    with_kernels = both()
    monkeypatch.setattr(int8, "kernels_for", lambda *_, **__: None)
    assert all(close(one, other, dtype) for one, other in zip(with_kernels, both(), strict=True))


def test_one_rounding_to_bf16() -> None:
    """Every bf16 output is the fp32 sum, rounded once, except for sums within the error of fp32 of a tie."""
    (W,) = weights([64], 37, torch.bfloat16)
    x, h, B = activations(32, 37, torch.bfloat16), normal(32, 4).bfloat16(), normal(64, 4).bfloat16()
    y = int8.output(Int8Inputs(x), W, None, h, B)
    exact = int8.reference_forward(x.float(), W, h.float() @ B.float().t())
    assert (y == exact.bfloat16()).float().mean() > 0.995


def test_weights_with_their_own_gain_are_quantized_apart() -> None:
    first, second = weights([5], 16, torch.float32) + weights([4], 16, torch.float32, kept=2)
    x = activations(6, 16, torch.float32).requires_grad_()
    inputs = Int8Inputs(x.detach())
    assert inputs.quantized(first) is inputs.quantized(replace(first, q=first.q.clone()))
    assert inputs.quantized(first) is not inputs.quantized(second)
    group = [Adapted(first), Adapted(second)]
    results = []
    for function in (linears, reference.linear):
        ys = function(x, group)
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), x)])
    assert all(close(one, other, torch.float32) for one, other in zip(*results, strict=True))


@dtypes
def test_int8_and_dense_weights_in_one_group(dtype: torch.dtype) -> None:
    group = sites([6, 5], 16, dtype, (2, 2))
    group[1] = replace(group[1], W=normal(5, 16).to(dtype))
    results = []
    for function in (linears, reference.linear):
        x = activations(4, 16, dtype, seed=1).requires_grad_()
        ys = function(x, group)
        results.append([*ys, *torch.autograd.grad([y.float().square().sum() for y in ys], x)])
    assert all(close(one, other, dtype) for one, other in zip(*results, strict=True))


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_recomputed_outputs_have_the_same_bits(p: float, dtype: torch.dtype) -> None:
    group = sites([18, 7], 37, dtype, (2, 3), p)
    x = activations(9, 37, dtype)
    with torch.no_grad():
        parts = Group.of(group, x)
        ys = parts.forward(x)
        again = Group.unpack(*parts.pack()).recompute(x)
    assert all(torch.equal(one, other) for one, other in zip(ys, again, strict=True))


@pytest.mark.parametrize("keep", [True, False], ids=["saved", "recomputed"])
def test_an_mlp_equals_its_reference(keep: bool) -> None:
    gate, up = sites([24, 24], 16, torch.float32, (2, 2))
    (down,) = sites([16], 24, torch.float32, (3,))
    x = normal(2, 5, 16).requires_grad_()
    results = []
    for fused in (True, False):
        if fused:
            y = mlp(x, Form((gate, up), down, activation("silu"), None, True))
        else:
            first, second = reference.linear(x, [gate, up])
            y = x + reference.linear(torch.nn.functional.silu(first) * second, [down])[0]
        inputs = [x, *(t for t in factors([gate, up, down]) if t is not None)]
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    # the two sides round x·g to different levels if they differ by one bit, so that few elements differ by one level
    assert all((a - b).norm() <= 1e-2 * b.norm() for a, b in zip(*results, strict=True))


def test_dropout_drops_the_same_elements_as_with_dense_weights() -> None:
    group = sites([18, 7], 37, torch.float32, (2, 3), 0.4)
    dense = [replace(site, W=int8_weight.dequantize(site.W)) for site in group if isinstance(site.W, Int8Weight)]
    results = []
    for each in (group, dense):
        torch.manual_seed(4)
        x = normal(9, 37).requires_grad_()
        ys = linears(x, each)
        inputs = [t for t in factors(each) if t is not None]
        results.append([*ys, *torch.autograd.grad([y.square().sum() for y in ys], [x, *inputs])])
    assert all((a - b).norm() <= 3e-2 * b.norm() for a, b in zip(*results, strict=True))


def test_the_plain_module_equals_its_reference() -> None:
    (W,) = weights([18], 37, torch.float32)
    bias = normal(18)
    results = []
    for function in (int8.int8_linear, reference.int8):
        x = normal(2, 5, 37).requires_grad_()
        y = function(x, W, bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert all(close(one, other, torch.float32) for one, other in zip(*results, strict=True))


def test_int8_matmuls_are_used_only_if_they_are_fast_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    here = this_machine()

    def reason(features: tuple[str, ...]) -> str:
        machine: Machine = replace(here, features=features)
        monkeypatch.setattr(int8, "this_machine", lambda: machine)
        return int8.why_no_int8_matmuls.__wrapped__()

    assert "avx512_vnni" in reason(("avx2",))
    monkeypatch.setattr(torch, "_int_mm", int8.reference_integer_matmul)
    assert reason(("avx512_vnni",)) == ""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: int8.reference_integer_matmul(a, b) + 1)
    assert "wrong" in reason(("avx512_vnni",))


def test_without_exact_int8_matmuls_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (W,) = weights([18], 37, torch.float32)
    x = activations(9, 37, torch.float32)
    before = int8.output(Int8Inputs(x), W)
    monkeypatch.setattr(int8, "why_no_int8_matmuls", lambda: "no units")
    assert torch.equal(int8.output(Int8Inputs(x), W), before)


def composed(x: Tensor, W: Int8Weight, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the output of the separate steps around an integer matmul."""
    with monkeypatch.context() as patched:
        patched.setattr(int8, "few_rows", lambda *_: None)
        return int8.output(Int8Inputs(x), W, bias)


FEW = pytest.mark.skipif(KERNELS is None or not KERNELS.few_rows, reason="no kernel for few rows on this processor")


@FEW
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13, 32])
@pytest.mark.parametrize("shape", [(1, 2), (18, 37), (33, 64), (70, 129)], ids=str)
@pytest.mark.parametrize("kept", [0, 2, 3])
def test_few_rows_have_the_bits_of_the_separate_steps(
    rows: int, shape: tuple[int, int], kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, width = shape
    (W,) = weights([out], width, dtype, kept)
    for bias in (None, normal(out, seed=3).to(dtype)):
        x = activations(rows, width, dtype, seed=1)
        with torch.no_grad():
            y = int8.int8_linear(x, W, bias)
        assert torch.equal(y, composed(x, W, bias, monkeypatch))
        expected = int8.reference_forward(x, W, bias)  # rounds a few elements of x·g to the next level
        assert (y - expected).norm() <= max(1e-3, BOUND[dtype]) * expected.norm()


@FEW
@dtypes
def test_few_rows_with_the_largest_integers_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    W = Int8Weight(
        torch.full((5, 1000), 127, dtype=torch.int8), torch.ones(5), torch.ones(1000), torch.tensor([], dtype=torch.int64),
        torch.empty(5, 0, dtype=dtype),
    )  # fmt: skip
    x = torch.stack([torch.full((1000,), 127.0), torch.full((1000,), -127.0)]).to(dtype)
    with torch.no_grad():
        y = int8.int8_linear(x, W)
    assert y[0].tolist() == (-y[1]).tolist() == [float(torch.tensor(127.0 * 127 * 1000, dtype=dtype))] * 5
    assert torch.equal(y, composed(x, W, None, monkeypatch))


@FEW
@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [3, 1], ids=["a quantized channel", "a kept channel"])
def test_few_rows_that_are_not_finite_stay_visible(
    column: int, value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    (W,) = weights([21], 37, dtype)
    assert 1 in W.kept and 3 not in W.kept
    x = activations(3, 37, dtype)
    x[1, column] = value
    with torch.no_grad():
        y = int8.int8_linear(x, W)
    assert not y[1].isfinite().any()
    assert torch.equal(y.nan_to_num(7), composed(x, W, None, monkeypatch).nan_to_num(7))
    assert y[[0, 2]].isfinite().all()


@FEW
@dtypes
def test_weights_that_share_an_input_with_few_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    group = sites([18, 7, 40], 37, dtype, (0, 0, 2))
    x = activations(4, 37, dtype)
    with torch.no_grad():
        few = linears(x, group)
        monkeypatch.setattr(int8, "few_rows", lambda *_: None)
        assert all(torch.equal(one, other) for one, other in zip(few, linears(x, group), strict=True))


@FEW
def test_only_few_rows_that_need_no_gradient_skip_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    (W,) = weights([18], 37, torch.float32)
    used = list[tuple[int, bool]]()
    real = int8.few_rows

    def counted(x: Tensor, *others: Any) -> Tensor | None:
        y = real(x, *others)
        used.append((x.numel() // 37, y is not None))
        return y

    monkeypatch.setattr(int8, "few_rows", counted)
    assert KERNELS is not None
    most = KERNELS.few_rows
    with torch.no_grad():
        assert int8.int8_linear(activations(2 * most, 37, torch.float32).view(2, most, 37), W).shape == (2, most, 18)
        assert int8.int8_linear(activations(most, 37, torch.float32)[None], W).shape == (1, most, 18)
        assert int8.int8_linear(torch.empty(0, 37), W).shape == (0, 18)
        assert int8.int8_linear(normal(2, 37).t().contiguous().t(), W).shape == (2, 18)
    assert (2 * most, True) not in used and (most, True) in used and (0, True) not in used
    x = activations(2, 37, torch.float32).requires_grad_()
    y = int8.int8_linear(x, W)
    assert torch.equal(y, int8.output(Int8Inputs(x.detach()), W))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.abs().sum() > 0


def test_kernels_are_used_here() -> None:
    """Otherwise, the tests above would compare PyTorch's operations with themselves."""
    if KERNELS is None:
        pytest.skip(f"no kernels: {compiled.describe()} ({building.SWITCH})")
    found = kernels_for(torch.ones(2, 3))
    assert found is not None and found.int8 is not None
