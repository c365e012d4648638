"""Linear layers for few rows: the rounded exact product, and rows that do not depend on each other, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorakit.ops.kernels import compiled
from lorakit.ops.linear import few_rows

KERNELS = compiled.kernels()
MOST = {} if KERNELS is None else KERNELS.linear_rows
DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.skipif(not MOST.get(d), reason=f"no kernel for {d}")) for d in DTYPES],
    ids=["fp32", "bf16"],
)
SHAPES = [(1, 1), (5, 3), (17, 33), (16, 32), (48, 64), (50, 577), (33, 1536), (192, 576), (31, 2049), (3, 4100)]
"""(out, in), also when they are not multiples of the sizes of tiles, and with rows that fill more than a cache."""
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of a rounded number."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(31 * seed + sum(shape)))


def operands(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (rows, in), W (out, in) and a bias (out,)."""
    out, width = shape
    return normal(rows, width, seed=1).to(dtype), normal(out, width).to(dtype), normal(out, seed=2).to(dtype)


def multiplied(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    y = few_rows(x, W, bias)
    assert y is not None
    return y


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dtypes
@shapes
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_result_is_the_exact_one_up_to_fp32_sums_and_one_rounding(
    shape: tuple[int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    x, W, bias = operands(MOST[dtype], shape, dtype)
    if not has_bias:
        bias = torch.zeros_like(bias)
    exact = x.double() @ W.double().t() + bias.double()
    terms = x.double().abs() @ W.double().abs().t() + bias.double().abs()
    bound = EPSILON[dtype] * exact.abs() + (shape[1] + 1) * EPSILON[torch.float32] * terms
    y = multiplied(x, W, bias if has_bias else None)
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= bound).all())


@dtypes
@shapes
def test_a_row_has_the_same_bits_among_any_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    most = MOST[dtype]
    x, W, bias = operands(most, shape, dtype)
    y = multiplied(x, W, bias)
    order = torch.randperm(most, generator=torch.Generator().manual_seed(0))
    assert torch.equal(multiplied(x[order], W, bias), y[order])
    for rows in (*range(1, 18), 31, 32, most):
        assert torch.equal(multiplied(x[:rows], W, bias), y[:rows])
        assert torch.equal(multiplied(x[most - rows :], W, bias), y[most - rows :])


@dtypes
@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    x, W, bias = operands(MOST[dtype], (1000, 577), dtype)
    y = multiplied(x, W, bias)
    torch.set_num_threads(1)
    assert torch.equal(multiplied(x, W, bias), y)


@dtypes
@shapes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max])
def test_what_is_not_finite_stays_in_its_row(shape: tuple[int, int], value: float, dtype: torch.dtype) -> None:
    x, W, bias = operands(MOST[dtype], shape, dtype)
    y = multiplied(x, W, bias)
    for row in (0, 5, len(x) - 1):
        others = x.clone()
        others[row] = value
        others = multiplied(others, W, bias)
        is_other = torch.arange(len(x)) != row
        assert torch.equal(others[is_other], y[is_other])
        assert math.isfinite(value) or not others[row].isfinite().any()


@dtypes
def test_a_weight_that_is_not_finite_stays_in_its_output(dtype: torch.dtype) -> None:
    x, W, bias = operands(20, (37, 70), dtype)
    y = multiplied(x, W, bias)
    W[35, 69] = torch.nan
    found = multiplied(x, W, bias)
    assert bool(found[:, 35].isnan().all())
    assert torch.equal(found[:, :35], y[:, :35]) and torch.equal(found[:, 36:], y[:, 36:])


@dtypes
def test_rows_of_a_weight_may_be_at_a_distance_and_at_any_address(dtype: torch.dtype) -> None:
    x, W, bias = operands(20, (37, 70), dtype)
    y = multiplied(x, W, bias)
    for apart, first in ((71, 0), (96, 3), (131, 1)):
        room = torch.full((37 * apart + first,), torch.nan, dtype=dtype)
        strided = room[first:].view(37, apart)[:, :70]
        strided.copy_(W)
        assert torch.equal(multiplied(x, strided, bias), y)
    assert few_rows(x, W.t().contiguous().t(), bias) is None


@dtypes
def test_denormal_numbers_are_zero_or_right(dtype: torch.dtype) -> None:
    """The instructions for bf16 treat them as zero, which changes a sum by less than the smallest normal number."""
    W, tiny = torch.ones(3, 40, dtype=dtype), torch.finfo(dtype).tiny
    y = multiplied(torch.full((2, 40), tiny / 4, dtype=dtype), W)
    assert set(y.flatten().tolist()) <= {0.0, 10 * tiny}


@dtypes
def test_the_shape_of_the_input_is_kept_and_rows_need_not_be_together(dtype: torch.dtype) -> None:
    x, W, bias = operands(6, (5, 9), dtype)
    y = multiplied(x, W, bias)
    assert torch.equal(multiplied(x.view(6, 1, 9), W, bias), y.view(6, 1, 5))
    assert torch.equal(multiplied(x.view(3, 2, 9)[:, -1:], W, bias), y.view(3, 2, 5)[:, -1:])
    assert torch.equal(multiplied(x[0], W, bias), y[0])


@dtypes
def test_calls_without_a_kernel(dtype: torch.dtype) -> None:
    x, W, bias = operands(MOST[dtype] + 1, (5, 9), dtype)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert few_rows(x, W, bias) is None
    assert few_rows(x[:0], W, bias) is None
    assert few_rows(x[:2].to(other), W, bias) is None
    assert few_rows(x[:2], W, bias.to(other)) is None
    assert few_rows(x[:2, :8], W, bias) is None
    assert few_rows(x[:2].double(), W.double()) is None
    assert few_rows(x[:2].to("meta"), W.to("meta")) is None
    assert few_rows(x[:2], W[0]) is None
