"""Multi-adapter batches: each method equals the loop over rows, in value and every gradient, and rows do not mix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorakit.ops import segments
from lorakit.ops.kernels import compiled
from lorakit.ops.reference import segments as reference
from lorakit.ops.segments import Method, Routed, are_few, method_for, segmented

D = torch.float64
METHODS: list[Method] = ["masked", "rows", "sorted"]
ROUTES = {
    "mixed": [2, 0, 2, -1, 3, 0],
    "sorted": [0, 0, 2, 2, 2, 3],
    "one": [1, 1, 1, 1, 1, 1],
    "none": [-1, -1, -1, -1, -1, -1],
    "none first": [-1, -1, 0, 1, 2, 3],
}


def made(rows: int = 6, between: tuple[int, ...] = (3,), dtype: torch.dtype = D) -> tuple[Tensor, ...]:
    """x, A, B, scales of four adapters, rank 2."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *between, 7, generator=g, dtype=D).to(dtype).requires_grad_()
    A, B = (torch.randn(4, *shape, generator=g, dtype=D).requires_grad_() for shape in ((2, 7), (5, 2)))
    return x, A, B, torch.tensor([0.5, 2.0, 0.7, 1.3])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("between", [(), (3,), (2, 2)])
def test_it_is_the_formula(method: Method, route: str, between: tuple[int, ...]) -> None:
    """Compute formula (72) in double precision."""
    x, A, B, scales = made(between=between)
    index = torch.tensor(ROUTES[route])
    y, expected = segmented(x, A, B, scales, index, method=method), reference(x, A, B, scales, index)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if route == "none":
        assert not y.any()
        return
    dy = torch.randn(y.shape, dtype=D)
    for a, b in zip(torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.is_contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: Method) -> None:
    x, A, B, scales = made()
    index = torch.tensor(ROUTES["mixed"])
    assert torch.autograd.gradcheck(lambda x, A, B: segmented(x, A, B, scales, index, method=method), (x, A, B))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strided", [False, True])
def test_it_is_added_in_place_where_asked(method: Method, strided: bool) -> None:
    x, A, B, scales = made()
    index = torch.tensor(ROUTES["mixed"])
    base = torch.randn(6, 5, 3, dtype=D).transpose(1, 2) if strided else torch.randn(6, 3, 5, dtype=D)
    start = base.clone().requires_grad_()
    into = start * 1
    if strided:
        into = (start.transpose(1, 2).contiguous() * 1).transpose(1, 2)
    y = segmented(x, A, B, scales, index, into, method)
    assert y.data_ptr() == into.data_ptr()
    expected = base + reference(x, A, B, scales, index)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(6, 3, 5, dtype=D)
    got = torch.autograd.grad(y, (start, x, A, B), dy)
    assert torch.equal(got[0], dy)
    for a, b in zip(got[1:], torch.autograd.grad(expected, (x, A, B), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        again = base.clone()
        assert segmented(x, A, B, scales, index, again, method) is again
        torch.testing.assert_close(again, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_what_it_is_alone(method: Method) -> None:
    x, A, B, scales = made()
    index = torch.tensor(ROUTES["mixed"])
    y = segmented(x, A, B, scales, index, method=method)
    for i in range(len(x)):
        alone = segmented(x[i : i + 1], A, B, scales, index[i : i + 1], method=method)
        torch.testing.assert_close(y[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["rows", "sorted"])
def test_an_adapter_that_is_not_finite_reaches_its_own_rows_only(method: Method) -> None:
    x, A, B, scales = made()
    index = torch.tensor(ROUTES["mixed"])
    A.data[0] = torch.nan
    finite = segmented(x, A, B, scales, index, method=method).isfinite().all((1, 2))
    assert finite.tolist() == [k != 0 for k in index]


@pytest.mark.parametrize("method", METHODS)
def test_lower_ranks_are_filled_up_with_zeros(method: Method) -> None:
    x, A, B, scales = made()
    A.data[2, 1], B.data[2, :, 1] = 0, 0
    index = torch.tensor(ROUTES["mixed"])
    y = segmented(x, A, B, scales, index, method=method)
    expected = 0.7 * (x[2] @ A[2, :1].t()) @ B[2, :, :1].t()
    torch.testing.assert_close(y[2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_precision_it_is_as_near_to_the_truth_as_the_loop(method: Method, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, 65, generator=g).to(dtype).requires_grad_()
    A, B = (torch.randn(4, *shape, generator=g).requires_grad_() for shape in ((8, 65), (33, 8)))
    index, scales = torch.tensor([2, 0, 2, -1, 3, 0, 0, 1, 2]), torch.tensor([0.5, 2.0, 0.7, 1.3], dtype=D)
    dy = torch.randn(9, 4, 33, generator=g).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
    results = []
    for call, (a, b, c), down in (
        (lambda *t: segmented(*t, method=method), (x, A, B), dy),
        (reference, (x, A, B), dy),
        (reference, exact, dy.double()),
    ):
        y = call(a, b, c, scales, index)
        results.append([y, *torch.autograd.grad(y, (a, b, c), down)])
    assert [t.dtype for t in results[0]] == [dtype, dtype, torch.float32, torch.float32]
    for fast, plain, true in zip(*results, strict=True):
        assert (fast.double() - true).norm() <= 1.5 * (plain.double() - true).norm() + 1e-3 * true.norm() * (
            dtype != torch.float32
        ) + 1e-6 * true.norm()
        assert (fast.double() - true).norm() <= (0.01 if dtype == torch.bfloat16 else 1e-6) * true.norm()


@pytest.mark.parametrize("frozen", ["A", "B", "both", "x"])
@pytest.mark.parametrize("method", METHODS)
def test_it_saves_what_the_asked_gradients_need(method: Method, frozen: str) -> None:
    x, A, B, scales = made()
    x.requires_grad_(frozen != "x")
    A.requires_grad_(frozen not in ("A", "both"))
    B.requires_grad_(frozen not in ("B", "both"))
    index = torch.tensor(ROUTES["one"])
    lasting = {t.data_ptr(): name for name, t in {"x": x, "A": A, "B": B, "scales": scales}.items()}
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = segmented(x, A, B, scales, index, method=method)
    assert ("x" in {lasting.get(t.data_ptr()) for t in saved}) == (A.requires_grad or B.requires_grad)
    thin = 18 * 2 * (4 if method == "masked" else 1) * 8 if B.requires_grad else 0
    assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in lasting) == thin
    asked = [t for t in (x, A, B) if t.requires_grad]
    expected = torch.autograd.grad(reference(x, A, B, scales, index).sum(), asked)
    for a, b in zip(torch.autograd.grad(y.sum(), asked), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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
    x, A, B, scales = made()
    for method in METHODS:
        first = segmented(x, A, B, scales, routed, method=method)
        assert torch.equal(first, segmented(x, A, B, scales, routed, method=method))


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
def test_the_way_follows_from_the_shape(
    rows: int, tokens: int, adapters: int, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in {*METHODS} - {method}:
        monkeypatch.setitem(segments._METHODS, other, None)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(*s, generator=g, dtype=D) for s in ((rows, tokens, 7), (adapters, 2, 7), (adapters, 5, 2)))
    index, scales = torch.arange(rows) * 7 % adapters, torch.rand(adapters, generator=g)
    y = segmented(x, A, B, scales, index)
    torch.testing.assert_close(y, reference(x, A, B, scales, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_scales_may_be_in_a_and_rows_in_the_adapters_order(method: Method) -> None:
    x, A, B, scales = made(4)
    index = torch.arange(4)
    assert Routed(index, 4).in_place
    scaled = A * scales[:, None, None]
    y = segmented(x, scaled, B, None, index, method=method)
    expected = reference(x, A, B, scales, index)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, A, B)), torch.autograd.grad(expected.sum(), (x, A, B)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_without_gradients(block: type) -> None:
    x, A, B, scales = made()
    index = torch.tensor(ROUTES["mixed"])
    expected = reference(x, A, B, scales, index).detach()
    with block():
        y = segmented(x, A, B, scales, index)
    assert y.grad_fn is None
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_it_compiles_as_one_graph(method: Method) -> None:
    """With routes computed in advance, since they depend on data."""
    x, A, B, scales = made()
    routed = Routed(torch.tensor(ROUTES["mixed"]), 4)

    def loss(x: Tensor) -> Tensor:
        base = x.sum().expand(6, 3, 5) * 1
        return segmented(x, A, B, scales, routed, base, method).square().sum()

    expected = [loss(x), *torch.autograd.grad(loss(x), (x, A, B))]
    torch.compiler.reset()
    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    for a, b in zip([value, *torch.autograd.grad(value, (x, A, B))], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_under_autocast_products_run_in_its_dtype() -> None:
    x, A, B, scales = made(dtype=torch.float32)
    index = torch.tensor(ROUTES["mixed"])
    with torch.autocast("cpu", torch.bfloat16):
        for method in METHODS:
            y = segmented(x, A, B, scales, index, method=method)
            assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y.float().sum(), (x, A, B))
            assert [g.dtype for g in grads] == [torch.float32, D, D]


def test_what_does_not_fit_is_refused() -> None:
    x, A, B, scales = made()
    with pytest.raises(ValueError, match=r"adapter indices \[-2, 4\] .* 0 to 3"):
        segmented(x, A, B, scales, torch.tensor([0, 4, -2, 1, 1, 1]))
    index = torch.tensor(ROUTES["mixed"])
    message = r"shapes do not match: x \(6, 3, 7\), A \(4, 2, 7\), .*; expected x \(rows, …, in\), A \(K, r, in\)"
    for bad in (
        (x, A, B[:3], scales, index),
        (x, A, B, scales[:3], index),
        (x, A, B, scales, index[:4]),
        (x, A, B, scales, index, torch.zeros(6, 5)),
        (x, A, B, scales, Routed(index, 5)),
    ):
        with pytest.raises(ValueError, match=message):
            segmented(*bad)


def test_rows_of_no_adapter_do_not_take_the_others_out_of_their_order() -> None:
    assert Routed(torch.tensor([-1, 0, 1, -1, 2]), 3).in_place
    assert not Routed(torch.tensor([-1, 1, 0, -1, 2]), 3).in_place
    assert not Routed(torch.tensor([0, 1]), 3).in_place
    x, A, B, scales = made()
    index = torch.tensor([-1, 0, 1, 2, -1, 3])
    y = segmented(x, A, B, scales, index, method="rows")
    torch.testing.assert_close(y, reference(x, A, B, scales, index), rtol=1e-12, atol=1e-12)


def test_a_product_with_all_adapters_needs_finite_numbers() -> None:
    """fp16 has a small range: a row times an adapter that it does not use can overflow."""
    rows = Routed(torch.tensor([0, 1, -1]), 2)
    assert method_for(torch.ones(3, 1, 7), rows) == "masked"
    assert method_for(torch.ones(3, 1, 7), rows, only_finite=False) == "rows"
    assert method_for(torch.ones(3, 1, 7, dtype=torch.float16), rows) == "rows"


COMPILED = pytest.mark.skipif(compiled.kernels() is None, reason=f"no kernels: {compiled.describe()}")


@COMPILED
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("between", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("strided", [False, True])
def test_the_compiled_way_is_the_formula(
    dtype: torch.dtype, bound: float, route: str, between: tuple[int, ...], strided: bool
) -> None:
    x, A, B, scales = (t.detach() for t in made(between=between, dtype=dtype))
    A[2, 1], B[2, :, 1] = 0, 0  # an adapter of lower rank
    x = x.flatten(0, -2).t().contiguous().t().view(x.shape) if strided and not between else x
    index = torch.tensor(ROUTES[route])
    exact = reference(x.double(), A, B, scales, index)
    y = segmented(x, A, B, scales, index, method="compiled")
    assert y.dtype == dtype
    assert float((y.double() - exact).norm()) <= bound * float(exact.norm())
    base = torch.randn(exact.shape).to(dtype)
    into = base.clone().mT.contiguous().mT if strided else base.clone()
    scaled = (A * scales[:, None, None]).to(dtype)
    assert segmented(x, scaled, B, None, index, into, "compiled") is into
    assert float((into.double() - base.double() - exact).norm()) <= bound * float((base.double() + exact).norm())
    none = index < 0
    assert torch.equal(into[none], base[none])


@COMPILED
def test_the_compiled_way_reads_its_own_adapters_only() -> None:
    x, A, B, _ = (t.detach().float() for t in made())
    A[0] = torch.nan
    index = torch.tensor(ROUTES["mixed"])
    finite = segmented(x, A, B, None, index, method="compiled").isfinite().all((1, 2))
    assert finite.tolist() == [k != 0 for k in index]
    one = segmented(x, A[1:2], B[1:2], None, torch.zeros(6, dtype=torch.int64), method="compiled")
    torch.testing.assert_close(one, reference(x, A[1:2], B[1:2], torch.ones(1), torch.zeros(6, dtype=torch.int64)))
    assert not segmented(x[:0], A, B, None, index[:0], method="compiled").numel()


INDICES = {
    "int64": torch.tensor(ROUTES["mixed"]),
    "int32": torch.tensor(ROUTES["mixed"], dtype=torch.int32),
    "every second": torch.tensor([[k, 10**6] for k in ROUTES["mixed"]])[:, 0],
    "every second of int32": torch.tensor([[k, 10**6] for k in ROUTES["mixed"]], dtype=torch.int32)[:, 0],
}


@pytest.mark.parametrize("method", [*METHODS, pytest.param("compiled", marks=COMPILED)])
@pytest.mark.parametrize("index", INDICES)
@torch.no_grad()
def test_an_index_of_any_integers_and_layout(method: Method, index: str) -> None:
    x, A, B, scales = (t.float() for t in made())
    expected = reference(x, A, B, scales, torch.tensor(ROUTES["mixed"]))
    torch.testing.assert_close(segmented(x, A, B, scales, INDICES[index], method=method), expected)
    rows = Routed(INDICES[index], 4)
    torch.testing.assert_close(segmented(x, A, B, scales, rows, method=method), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_an_index_that_is_not_of_integers_is_rejected(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="integer"):
        Routed(torch.tensor([0, 1, 1], dtype=dtype), 2)


@COMPILED
@pytest.mark.parametrize("strange", [-2, 4, 2**40])
@torch.no_grad()
def test_an_index_changed_after_it_was_checked_is_rejected(strange: int) -> None:
    x, A, B, scales = (t.float() for t in made())
    rows = Routed(torch.tensor(ROUTES["mixed"]), 4)
    rows.index[2] = strange
    with pytest.raises(ValueError, match="index"):
        segmented(x, A, B, scales, rows, method="compiled")


@COMPILED
def test_rows_of_another_dtype_than_they_were_made_ready_for_are_rejected() -> None:
    x, A, B, scales = (t.detach().float() for t in made())
    own = segments.compiled_method(A, B, scales, Routed(torch.tensor(ROUTES["mixed"]), 4), x)
    assert own is not None
    with pytest.raises(ValueError, match="bfloat16"):
        own.forward(x.bfloat16(), None)
    with pytest.raises(ValueError, match="index"):
        own.forward(x[:3], None)


@COMPILED
def test_the_compiled_method_adds_to_another_dtype() -> None:
    x, A, B, scales = (t.detach() for t in made())
    index, into = torch.tensor(ROUTES["mixed"]), torch.ones(6, 3, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = segmented(x.float(), A, B, scales, index, into, "compiled")
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, 1 + reference(x, A, B, scales, index), rtol=0.05, atol=0.05)


def test_the_compiled_method_raises_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    x, A, B, scales = made(dtype=torch.float32)
    index = torch.tensor(ROUTES["mixed"])
    message = r'method="compiled" does not record gradients'
    with pytest.raises(ValueError, match=message):
        segmented(x, A, B, scales, index, method="compiled")
    monkeypatch.setattr(segments, "kernels_for", lambda *_, **__: None)
    message = r'method="compiled" has no kernel for torch\.float32 on cpu'
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        segmented(x, A, B, scales, index, method="compiled")


def test_few_short_rows_are_for_a_kernel() -> None:
    one, many = Routed(torch.zeros(32, dtype=torch.int64), 1), Routed(torch.arange(128) % 32, 32)
    assert are_few(torch.ones(32, 1, 7), one)
    assert are_few(torch.ones(128, 3, 7), many)
    assert not are_few(torch.ones(128, 4, 7), many)
    assert not are_few(torch.ones(32, 2, 7), one)
    assert method_for(torch.ones(32, 16, 7), one) == "sorted"
