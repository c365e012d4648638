"""Multi-adapter batches: each method equals the loop over rows, and rows do not mix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops.kernels import compiled
from lorakit.ops.reference import segments as reference
from lorakit.ops.segments import Method, PerRowLora, Routed, Segments, are_few, compiled_method, method_for

D = torch.float64
METHODS: list[Method] = ["masked", "rows", "sorted"]
ROUTES = {
    "mixed": [2, 0, 2, -1, 3, 0],
    "sorted": [0, 0, 2, 2, 2, 3],
    "one": [1, 1, 1, 1, 1, 1],
    "none": [-1, -1, -1, -1, -1, -1],
    "none first": [-1, -1, 0, 1, 2, 3],
}


COMPILED = pytest.mark.skipif(compiled.kernels() is None, reason=f"no kernels: {compiled.describe()}")


def made(rows: int = 6, between: tuple[int, ...] = (3,), dtype: torch.dtype = D) -> tuple[Tensor, ...]:
    """x, A, B of four adapters, rank 2."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *between, 7, generator=g, dtype=D)
    A, B = (torch.randn(4, *shape, generator=g, dtype=D) for shape in ((2, 7), (5, 2)))
    return x.to(dtype), A.to(dtype), B.to(dtype)


def segmented(x: Tensor, A: Tensor, B: Tensor, index: Tensor, method: str, y: Tensor | None = None) -> Tensor:
    """Return the result of a method, added to y in place if it is given."""
    y = x.new_zeros(*x.shape[:-1], B.shape[1]) if y is None else y
    matmuls_of(x, A, B, Routed(index, len(A)), method).add(x, y)
    return y


def matmuls_of(x: Tensor, A: Tensor, B: Tensor, rows: Routed, method: str) -> Segments | PerRowLora:
    B = B.transpose(1, 2).contiguous().transpose(1, 2)
    own = compiled_method(A, B, rows, x) if method == "compiled" else Segments(A, B, rows, method)  # type: ignore[arg-type]
    assert own is not None
    return own


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("between", [(), (3,), (2, 2)])
def test_it_is_the_formula(method: Method, route: str, between: tuple[int, ...]) -> None:
    """Compute formula (72) in double precision."""
    x, A, B = made(between=between)
    index = torch.tensor(ROUTES[route])
    y, expected = segmented(x, A, B, index, method), reference(x, A, B, index)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert bool(y.any()) == (route != "none")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strided", [False, True])
def test_it_is_added_in_place(method: Method, strided: bool) -> None:
    x, A, B = made()
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if strided else x
    index, base = torch.tensor(ROUTES["mixed"]), torch.randn(6, 3, 5, dtype=D)
    y = segmented(x, A, B, index, method, base.clone())
    torch.testing.assert_close(y, base + reference(x, A, B, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_what_it_is_alone(method: Method) -> None:
    x, A, B = made()
    index = torch.tensor(ROUTES["mixed"])
    y = segmented(x, A, B, index, method)
    for i in range(len(x)):
        alone = segmented(x[i : i + 1], A, B, index[i : i + 1], method)
        torch.testing.assert_close(y[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["rows", "sorted"])
def test_an_adapter_that_is_not_finite_reaches_its_own_rows_only(method: Method) -> None:
    x, A, B = made()
    index = torch.tensor(ROUTES["mixed"])
    A[0] = torch.nan
    finite = segmented(x, A, B, index, method).isfinite().all((1, 2))
    assert finite.tolist() == [k != 0 for k in index]


@pytest.mark.parametrize("method", METHODS)
def test_lower_ranks_are_filled_up_with_zeros(method: Method) -> None:
    x, A, B = made()
    A[2, 1], B[2, :, 1] = 0, 0
    y = segmented(x, A, B, torch.tensor(ROUTES["mixed"]), method)
    torch.testing.assert_close(y[2], (x[2] @ A[2, :1].t()) @ B[2, :, :1].t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_precision_it_is_as_near_to_the_truth_as_the_loop(method: Method, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(*shape, generator=g).to(dtype) for shape in ((9, 4, 65), (4, 8, 65), (4, 33, 8)))
    index = torch.tensor([2, 0, 2, -1, 3, 0, 0, 1, 2])
    fast, plain = segmented(x, A, B, index, method), reference(x, A, B, index)
    true = reference(x.double(), A.double(), B.double(), index)
    assert fast.dtype == dtype
    error, usual, size = (float(t.norm()) for t in (fast.double() - true, plain.double() - true, true))
    assert error <= 1.5 * usual + (1e-3 if dtype == torch.bfloat16 else 1e-6) * size
    assert error <= (0.01 if dtype == torch.bfloat16 else 1e-6) * size


def test_routes_are_worked_out_once() -> None:
    routed = Routed(torch.tensor([2, 0, 2, -1, 3, 0]), 4)
    assert routed.order is routed.order
    assert routed.order is not None
    assert routed.order.tolist() == [1, 5, 0, 2, 4]
    assert routed.runs == [(0, 0, 2), (2, 2, 4), (3, 4, 5)]
    assert routed.served is not None
    assert routed.served.tolist() == [0, 1, 2, 4, 5]
    settled = Routed(torch.tensor([0, 0, 3]), 4)
    assert settled.order is None
    assert settled.served is None


@pytest.mark.parametrize("method", [*METHODS, pytest.param("compiled", marks=COMPILED)])
def test_matmuls_can_be_used_again(method: str) -> None:
    x, A, B = made(dtype=torch.float32)
    matmuls = matmuls_of(x, A, B, Routed(torch.tensor(ROUTES["mixed"]), 4), method)
    first, second = torch.zeros(6, 3, 5), torch.zeros(6, 3, 5)
    matmuls.add(x, first)
    matmuls.add(x, second)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("rows", "tokens", "adapters", "method"),
    [
        (1, 1, 4, "masked"),
        (32, 1, 8, "masked"),
        (512, 1, 8, "sorted"),
        (4, 128, 4, "rows"),
        (32, 1, 32, "rows"),
        (512, 1, 32, "sorted"),
    ],
)
def test_the_way_follows_from_the_shape(rows: int, tokens: int, adapters: int, method: Method) -> None:
    index = torch.arange(rows) * 7 % adapters
    assert method_for(torch.ones(rows, tokens, 7), Routed(index, adapters)) == method


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_the_adapters_order(method: Method) -> None:
    x, A, B = made(4)
    index = torch.arange(4)
    assert Routed(index, 4).in_place
    torch.testing.assert_close(segmented(x, A, B, index, method), reference(x, A, B, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_it_compiles_as_one_graph(method: Method) -> None:
    """With routes computed in advance, since they depend on data."""
    x, A, B = made()
    routed = Routed(torch.tensor(ROUTES["mixed"]), 4)
    matmuls = matmuls_of(x, A, B, routed, method)

    def run(x: Tensor) -> Tensor:
        y = x.sum().expand(6, 3, 5) * 1
        matmuls.add(x, y)
        return y

    expected = run(x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(x), expected)


def test_rows_of_no_adapter_do_not_take_the_others_out_of_their_order() -> None:
    assert Routed(torch.tensor([-1, 0, 1, -1, 2]), 3).in_place
    assert not Routed(torch.tensor([-1, 1, 0, -1, 2]), 3).in_place
    assert not Routed(torch.tensor([0, 1]), 3).in_place
    x, A, B = made()
    index = torch.tensor([-1, 0, 1, 2, -1, 3])
    torch.testing.assert_close(segmented(x, A, B, index, "rows"), reference(x, A, B, index), rtol=1e-12, atol=1e-12)


def test_a_product_with_all_adapters_needs_finite_numbers() -> None:
    """fp16 has a small range: a row times an adapter that it does not use can overflow."""
    rows = Routed(torch.tensor([0, 1, -1]), 2)
    assert method_for(torch.ones(3, 1, 7), rows) == "masked"
    assert method_for(torch.ones(3, 1, 7), rows, only_finite=False) == "rows"
    assert method_for(torch.ones(3, 1, 7, dtype=torch.float16), rows) == "rows"


@COMPILED
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("between", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("strided", [False, True])
def test_the_compiled_way_is_the_formula(
    dtype: torch.dtype, bound: float, route: str, between: tuple[int, ...], strided: bool
) -> None:
    x, A, B = made(between=between, dtype=dtype)
    A[2, 1], B[2, :, 1] = 0, 0  # an adapter of lower rank
    x = x.flatten(0, -2).t().contiguous().t().view(x.shape) if strided and not between else x
    index = torch.tensor(ROUTES[route])
    exact = reference(x.double(), A.double(), B.double(), index)
    y = segmented(x, A, B, index, "compiled")
    assert y.dtype == dtype
    assert float((y.double() - exact).norm()) <= bound * float(exact.norm())
    base = torch.randn(exact.shape).to(dtype)
    y = segmented(x, A, B, index, "compiled", base.clone())
    assert float((y.double() - base.double() - exact).norm()) <= bound * float((base.double() + exact).norm())
    none = index < 0
    assert torch.equal(y[none], base[none])


@COMPILED
def test_the_compiled_way_reads_its_own_adapters_only() -> None:
    x, A, B = (t.float() for t in made())
    A[0] = torch.nan
    index = torch.tensor(ROUTES["mixed"])
    finite = segmented(x, A, B, index, "compiled").isfinite().all((1, 2))
    assert finite.tolist() == [k != 0 for k in index]
    zeros = torch.zeros(6, dtype=torch.int64)
    one = segmented(x, A[1:2], B[1:2], zeros, "compiled")
    torch.testing.assert_close(one, reference(x, A[1:2], B[1:2], zeros))
    assert not segmented(x[:0], A, B, index[:0], "compiled").numel()


@COMPILED
@pytest.mark.parametrize("strange", [-2, 4, 2**40])
def test_an_index_changed_after_it_was_made_ready_is_rejected(strange: int) -> None:
    x, A, B = (t.float() for t in made())
    rows = Routed(torch.tensor(ROUTES["mixed"]), 4)
    matmuls = matmuls_of(x, A, B, rows, "compiled")
    rows.index[2] = strange
    with pytest.raises(ValueError, match="index"):
        matmuls.add(x, torch.zeros(6, 3, 5))


@COMPILED
def test_rows_of_another_dtype_or_number_than_they_were_made_ready_for_are_rejected() -> None:
    x, A, B = (t.float() for t in made())
    matmuls = matmuls_of(x, A, B, Routed(torch.tensor(ROUTES["mixed"]), 4), "compiled")
    with pytest.raises(ValueError, match="bfloat16"):
        matmuls.add(x.bfloat16(), torch.zeros(6, 3, 5))
    with pytest.raises(ValueError, match="index"):
        matmuls.add(x[:3], torch.zeros(3, 3, 5))


def test_there_is_no_kernel_for_factors_of_another_dtype_or_layout() -> None:
    x, A, B = (t.float() for t in made())
    rows = Routed(torch.tensor(ROUTES["mixed"]), 4)
    assert compiled_method(A.double(), B.transpose(1, 2).contiguous().transpose(1, 2), rows, x) is None
    assert compiled_method(A, B, rows, x) is None


def test_few_short_rows_are_for_a_kernel() -> None:
    one, many = Routed(torch.zeros(32, dtype=torch.int64), 1), Routed(torch.arange(128) % 32, 32)
    assert are_few(torch.ones(32, 1, 7), one)
    assert are_few(torch.ones(128, 3, 7), many)
    assert not are_few(torch.ones(128, 4, 7), many)
    assert not are_few(torch.ones(32, 2, 7), one)
    assert method_for(torch.ones(32, 16, 7), one) == "sorted"
