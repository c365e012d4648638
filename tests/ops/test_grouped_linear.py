"""Grouped linear modules with adapters, compared with their reference one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.grouped_linear import STEP, GroupedLinear, GroupedLowRank, grouped_linear

IN, OUT, R = 6, 5, 3
COUNTS = (4, 0, 1, 3)


def linear(dtype: torch.dtype = torch.float64, *, in_first: bool = False, bias: bool = False) -> GroupedLinear:
    torch.manual_seed(0)
    sizes = (IN, OUT) if in_first else (OUT, IN)
    W = torch.randn(len(COUNTS), *sizes, dtype=dtype)
    return GroupedLinear(W, torch.randn(len(COUNTS), OUT, dtype=dtype) if bias else None, in_first)


def adapters(count: int, dtype: torch.dtype = torch.float64) -> list[GroupedLowRank]:
    torch.manual_seed(1)
    made = []
    for number in range(count):
        r = R + number
        A, B = torch.randn(len(COUNTS), r, IN, dtype=dtype), torch.randn(len(COUNTS), OUT, r, dtype=dtype)
        made.append(GroupedLowRank(A.requires_grad_(), B.requires_grad_(), 0.5 + number))
    return made


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(sum(COUNTS), IN, dtype=dtype, requires_grad=True)


def both(x: Tensor, given: GroupedLinear | None, low: list[GroupedLowRank]) -> list[list[Tensor]]:
    """Return the output and all gradients of the operation and of its reference."""
    leaves = [x, *(factor for one in low for factor in (one.A, one.B))]
    made = []
    for function in (grouped_linear, reference.grouped_linear):
        y = function(x, COUNTS, given, low)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        made.append([y.detach(), *torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True)])
    return made


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_first", [False, True])
def test_values_and_gradients(in_first: bool, bias: bool, count: int) -> None:
    ours, theirs = both(rows(), linear(in_first=in_first, bias=bias), adapters(count))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_adapters_alone() -> None:
    ours, theirs = both(rows(), None, adapters(2))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "A", "B", "A and B"])
def test_frozen_operands(frozen: str) -> None:
    x, low = rows(), adapters(1)
    for name in frozen.split(" and "):
        (x if name == "x" else getattr(low[0], name)).requires_grad_(False)
    ours, theirs = both(x, linear(), low)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_factors_in_fp32_on_a_base_in_bf16() -> None:
    low = adapters(1, torch.float32)
    ours, theirs = both(rows(torch.bfloat16), linear(torch.bfloat16), low)
    assert [one.dtype for one in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) < 2e-2


def test_only_the_input_and_a_row_of_rank_r_are_saved() -> None:
    x, low, saved = rows(), adapters(1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_linear(x, COUNTS, linear(), low)
    assert sorted(tuple(t.shape) for t in saved) == sorted([(8, IN), (8, R), (4, R, IN), (4, OUT, R)])


def test_autocast_narrows() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(rows(torch.float32), COUNTS, linear(torch.float32, bias=True), adapters(1, torch.float32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_trained_weights_are_an_error() -> None:
    given = linear()
    given.W.requires_grad_()
    with pytest.raises(ValueError, match="freeze"):
        grouped_linear(rows(), COUNTS, given, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_narrow_dtypes_with_groups_of_any_size(dtype: torch.dtype, bias: bool) -> None:
    """Groups shorter and longer than a multiple of the step, and a last group without rows to spare."""
    counts = (STEP + 1, 3, 0, STEP, 1)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    given = GroupedLinear(random(len(counts), OUT, IN), random(len(counts), OUT) if bias else None)
    low = GroupedLowRank(
        random(len(counts), R, IN, dtype=torch.float32).requires_grad_(),
        random(len(counts), OUT, R, dtype=torch.float32).requires_grad_(),
        0.5,
    )
    x = random(sum(counts), IN).requires_grad_()
    leaves = (x, low.A, low.B)
    y = grouped_linear(x, counts, given, [low])
    slope = random(*y.shape)
    found = [y, *torch.autograd.grad(y, leaves, slope)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide = GroupedLinear(given.W.double(), None if given.bias is None else given.bias.double())
    z = reference.grouped_linear(exact[0], counts, wide, [GroupedLowRank(exact[1], exact[2], 0.5)])
    wanted = [z, *torch.autograd.grad(z, exact, slope.double())]
    bound = 3 * torch.finfo(dtype).eps
    for one, other in zip(found, wanted, strict=True):
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < bound
    assert [one.dtype for one in found] == [dtype, dtype, torch.float32, torch.float32]
