"""Low-rank matmuls of a backward pass in one function, compared with double precision and with PyTorch's matmuls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.int8_weight import Int8Weight, input_scales, quantize_weight
from lorakit.ops.kernels import compiled
from lorakit.ops.kernels.compiled_matmuls import WIDEST, CompiledLowRankGradients
from lorakit.ops.linear import LowRankMatmuls, linears, low_rank_matmuls

KERNELS = compiled.kernels()
KERNEL = None if KERNELS is None else KERNELS.low_rank
pytestmark = pytest.mark.skipif(KERNEL is None, reason="no compiled low-rank matmuls for this processor")
BF16 = torch.bfloat16
ROUNDING, SUMS = 2**-8, 2**-16
"""Largest relative error of a rounded result, and of an fp32 sum relative to the sum of the absolute values."""


@pytest.fixture
def kernel() -> CompiledLowRankGradients:
    assert isinstance(KERNEL, CompiledLowRankGradients)
    return KERNEL


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(31 * seed + sum(shape)))


def operands(rows: int, out: int, r: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dy, B, columns and h; h is a slice of a wider matrix, as if several adapters shared an input."""
    h = normal(rows, r + 3, seed=4).to(BF16)[:, 2 : r + 2]
    return normal(rows, out, seed=1).to(BF16), normal(out, r, seed=2).to(BF16), normal(out, k, seed=3).to(BF16), h


def is_product(found: Tensor | None, left: Tensor, right: Tensor, rounding: float) -> bool:
    """Return whether a result is left·right, up to the rounding of the result and of fp32 sums."""
    exact, bound = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    return found is not None and bool(((found.double() - exact).abs() <= rounding * exact.abs() + SUMS * bound).all())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 31, 32, 129, 435, 1100])
@pytest.mark.parametrize(
    "out, r, k", [(32, 1, 3), (96, 5, 20), (192, 16, 16), (576, 16, 1), (64, 40, 33), (160, 64, 64)]
)
def test_results_equal_those_in_double_precision(
    kernel: CompiledLowRankGradients, threads: Callable[[int], None], rows: int, out: int, r: int, k: int, count: int
) -> None:
    threads(count)
    dy, B, columns, h = operands(rows, out, r, k)
    dh, kept, grad = kernel.low_rank_gradients(dy, B, columns, h)
    assert dh is not None and dh.dtype == BF16
    assert is_product(dh, dy, B, ROUNDING)
    assert is_product(kept, dy, columns, 0)
    assert is_product(grad, dy.t(), h, 0)


@pytest.mark.parametrize("asked", [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_only_requested_results_are_computed(kernel: CompiledLowRankGradients, asked: tuple[int, int, int]) -> None:
    dy, *others = operands(150, 96, 7, 5)
    both = kernel.low_rank_gradients(dy, *others)
    B, columns, h = (each if wanted else None for each, wanted in zip(others, asked, strict=True))
    found = kernel.low_rank_gradients(dy, B, columns, h)
    assert [each is not None for each in found] == [bool(wanted) for wanted in asked]
    assert all(one is None or torch.equal(one, other) for one, other in zip(found, both, strict=True))


@pytest.mark.parametrize("rows", [33, 435, 1100])
def test_the_number_of_threads_changes_no_bit(
    kernel: CompiledLowRankGradients, threads: Callable[[int], None], rows: int
) -> None:
    given, results = operands(rows, 576, 16, 16), []
    for count in (1, 2, 3, 9):
        threads(count)
        results.append(kernel.low_rank_gradients(*given))
    for made in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], made, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(4))
def test_nan_and_infinity_reach_the_same_elements_as_in_pytorch(
    kernel: CompiledLowRankGradients, place: int, value: float
) -> None:
    given = operands(200, 96, 5, 3)
    given[place][-3, 1] = value
    dy, B, columns, h = given
    expected = torch.mm(dy, B), torch.mm(dy, columns), torch.mm(dy.t(), h)
    for found, other in zip(kernel.low_rank_gradients(*given), expected, strict=True):
        assert found is not None
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(other))


def test_bf16_matmuls_of_pytorch_between_the_calls_stay_right(kernel: CompiledLowRankGradients) -> None:
    """PyTorch uses the same registers, and sets them up once per thread."""
    given, x, dense = operands(64, 96, 16, 16), normal(64, 576).to(BF16), normal(576, 320).to(BF16)
    expected, first = x @ dense, kernel.low_rank_gradients(*given)
    for _ in range(3):
        again = kernel.low_rank_gradients(*given)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))  # type: ignore[arg-type]
        assert torch.equal(x @ dense, expected)


def test_other_sizes_and_tensors_are_not_supported(kernel: CompiledLowRankGradients) -> None:
    dy, _, _, h = operands(40, 96, 16, 1)
    assert kernel.supports(dy, h, 16)
    assert kernel.supports(dy, None, WIDEST)
    assert not kernel.supports(dy, None, WIDEST + 1)
    assert not kernel.supports(dy, h.float(), 16)
    assert not kernel.supports(dy, h.t().contiguous().t(), 16)
    assert not kernel.supports(dy[:, :80], h, 16)
    assert not kernel.supports(dy[:0], h[:0], 16)
    assert not kernel.supports(dy.float(), h.float(), 16)


def test_what_is_not_supported_is_multiplied_by_pytorch() -> None:
    for dtype, out, r in ((torch.float32, 96, 4), (BF16, 80, 4), (BF16, 96, WIDEST + 1)):
        dy, B, columns, h = (each.to(dtype) for each in operands(40, out, r, 3))
        found = low_rank_matmuls(dy, B, columns, h)
        expected = LowRankMatmuls(dy @ B, (dy @ columns).float(), torch.mm(h.t(), dy).t())
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]
    assert low_rank_matmuls(dy, None, None, None) == (None, None, None)


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "not supported": lambda dy, B, columns, h: (dy[:, :80].contiguous(), B[:80], columns[:80], h),
    "dy": lambda dy, B, columns, h: (dy.t().contiguous().t(), B, columns, h),
    "B": lambda dy, B, columns, h: (dy, B[:64], columns, h),
    "columns": lambda dy, B, columns, h: (dy, B, columns.float(), h),
    "h": lambda dy, B, columns, h: (dy, B, columns, h[:-1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors_are_rejected(kernel: CompiledLowRankGradients, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        kernel.low_rank_gradients(*WRONG[name](*operands(40, 96, 16, 3)))


def int8_weights(*shapes: tuple[int, int]) -> list[Int8Weight]:
    """Return int8 weights that share an input and 5 channels that are left out."""
    width = shapes[0][1]
    dense = [normal(*shape, seed=number).to(BF16) / width**0.5 for number, shape in enumerate(shapes)]
    gain, left_out = input_scales(normal(64, width).abs().amax(0), dense, 5)
    return [quantize_weight(W, gain, left_out) for W in dense]


def group_of(weights: list[Tensor] | list[Int8Weight], p: float, dtype: torch.dtype) -> list[Adapted]:
    """Return modules with an adapter each, except for the last one; B of the second one is frozen."""
    group = []
    for number, W in enumerate(weights):
        out, width = (W.q if isinstance(W, Int8Weight) else W).shape
        A, B = normal(4 + number, width, seed=5).to(dtype), normal(out, 4 + number, seed=6).to(dtype)
        low = LowRank(A.requires_grad_(), B.requires_grad_(number != 1), 0.5, p)
        group.append(Adapted(W, None, None if number == len(weights) - 1 else low))
    return group


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16 factors", "fp32 factors"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("need_dx", [True, False])
def test_gradients_of_linear_modules_are_those_without_the_kernel(
    quantized: bool, p: float, dtype: torch.dtype, need_dx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (128, 96), (64, 96), (96, 96), (32, 96)
    weights = int8_weights(*shapes) if quantized else [normal(*shape).to(BF16) / 10 for shape in shapes]
    group = group_of(weights, p, dtype)
    calls: list[bool] = []

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        x = normal(3, 47, 96, seed=1).to(BF16).requires_grad_(need_dx)
        ys = linears(x, group)
        into = [t for t in ([x] if need_dx else []) + factors(group) if t is not None and t.requires_grad]
        dys = [normal(*y.shape, seed=3).to(BF16) for y in ys]
        pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
        return list(torch.autograd.grad([y for y, _ in pairs], into, [dy for _, dy in pairs]))

    used = CompiledLowRankGradients.low_rank_gradients
    monkeypatch.setattr(
        CompiledLowRankGradients, "low_rank_gradients", lambda *given: (calls.append(True), used(*given))[1]
    )
    found = gradients()
    assert len(calls) == (4 if quantized and need_dx else 3)
    kernels = compiled.kernels()
    assert kernels is not None
    monkeypatch.setattr(kernels, "low_rank", None)
    expected = gradients()
    assert len(calls) == (4 if quantized and need_dx else 3)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous() and one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= 2**-6 * other.double().abs().max()
