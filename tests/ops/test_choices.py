"""Active choices for matmuls and attention: equal results, limited to this context and thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.ops import attention, choices
from lorakit.ops.activation import activation
from lorakit.ops.adapted import Adapted, LowRank
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.choices import activate, matmul, matmul_name, slices
from lorakit.ops.cross_entropy import Head, linear_cross_entropy
from lorakit.ops.linear import linears
from lorakit.ops.mlp import Form, mlp

from .differentiable import attention as differentiable

ROWS, IN, OUT = 700, 48, 32


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """Rows of each matmul."""

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                seen.append(len(args[-2]))
            return func(*args, **(kwargs or {}))

    seen: list[int] = []
    with Counting():  # type: ignore[no-untyped-call]
        yield seen


@pytest.mark.parametrize(
    ("rows", "size", "wanted"), [(700, 256, [240, 240, 220]), (1024, 512, [512, 512]), (1, 256, [1])]
)
def test_slices_are_about_equal_and_cover_all(rows: int, size: int, wanted: list[int]) -> None:
    parts = list(slices(rows, size))
    assert [part.stop - part.start for part in parts] == wanted
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]


def test_no_slice_is_larger_than_asked_and_the_last_is_no_sliver() -> None:
    for size in choices.SLICES:
        for rows in range(1, 3000, 7):
            sizes = [part.stop - part.start for part in slices(rows, size)]
            assert sum(sizes) == rows
            assert max(sizes) <= size
            assert len(sizes) == -(-rows // size)


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("plus", ["nothing", "a row", "out"])
@pytest.mark.parametrize("size", choices.SLICES)
def test_a_product_in_slices_is_the_product(by_columns: bool, plus: str, size: int, counted: list[int]) -> None:
    x, right = drawn(ROWS, IN), drawn(OUT, IN).t() if by_columns else drawn(IN, OUT)
    room = drawn(ROWS, OUT)
    added = {"nothing": None, "a row": drawn(OUT), "out": room}[plus]
    wanted = x @ right + (0 if added is None else added)
    counted.clear()
    with activate({matmul_name(ROWS, right): size}):
        got = matmul(x, right, room if plus == "out" else None, added)
    assert len(counted) == -(-ROWS // size)
    assert sum(counted) == ROWS
    assert (got is room) == (plus == "out")
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("plus", ["nothing", "a row", "rows", "out"])
@pytest.mark.parametrize("shape", [(IN, OUT), (5000, 24), (24, 5000)])  # also several blocks, in either dimension
def test_a_product_through_fp32_is_rounded_once(by_columns: bool, plus: str, shape: tuple[int, int]) -> None:
    inner, outer = shape
    x = drawn(ROWS, inner).bfloat16()
    right = drawn(outer, inner).bfloat16().t() if by_columns else drawn(inner, outer).bfloat16()
    room = drawn(ROWS, outer).bfloat16()
    added = {"nothing": None, "a row": drawn(outer).bfloat16(), "rows": room.flip(0), "out": room}[plus]
    wanted = x.double() @ right.double() + (0 if added is None else added.double())
    with activate({choices.fp32_name(right): 1}):
        got = matmul(x, right, room if plus == "out" else None, added)
    assert got.dtype == torch.bfloat16
    assert (got is room) == (plus == "out")
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-4 * inner**0.5)


def test_a_product_of_wider_rows_is_in_their_dtype() -> None:
    x, right, plus = drawn(ROWS, 5000).float(), drawn(5000, OUT).bfloat16(), drawn(ROWS, OUT).float()
    wanted = x.double() @ right.double()
    for out, added in ((None, None), (None, plus), (plus.clone(), None), (plus.clone(), plus), (None, plus[0])):
        got = matmul(x, right, out, added)
        assert got.dtype == torch.float32
        assert out is None or got is out
        torch.testing.assert_close(got.double(), wanted + (0 if added is None else added), rtol=1e-5, atol=1e-3)
    with pytest.raises(RuntimeError, match="dtype"):  # nothing is downcast
        matmul(x.double(), right)
    wanted += plus
    assert matmul(x, right, plus, plus) is plus
    torch.testing.assert_close(plus.double(), wanted, rtol=1e-5, atol=1e-3)


def test_few_rows_and_other_dtypes_do_not_go_through_fp32(counted: list[int]) -> None:
    x, right = drawn(choices.FEWEST_IN_FP32, IN).bfloat16(), drawn(IN, OUT).bfloat16()
    with activate({choices.fp32_name(right): 1}):
        assert torch.equal(matmul(x[1:], right), x[1:] @ right)
        matmul(x.half(), right.half())
    assert choices.fp32_name(right) != choices.fp32_name(right.t().contiguous().t())  # nor weights with other strides


def test_head_and_loss_go_through_fp32_where_that_was_chosen() -> None:
    h, W, labels = drawn(300, 16).bfloat16(), drawn(5000, 16).bfloat16(), torch.randint(0, 5000, (300,))
    results = []
    for acts in ({}, {choices.fp32_name(W.t()): 1, choices.fp32_name(W): 1}):
        leaf = h.clone().requires_grad_()
        with activate(acts), Widths() as widths:  # type: ignore[no-untyped-call]
            loss = linear_cross_entropy(leaf, Head(W), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        assert widths.seen == {torch.float32 if acts else torch.bfloat16}
        results.append((loss.detach(), leaf.grad))
    for plain, through in zip(*results, strict=True):
        torch.testing.assert_close(plain, through, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_modules_that_share_an_input_are_multiplied_in_fp32_and_rounded_once(transposed: bool, dropout: float) -> None:
    x, factors = drawn(ROWS, IN).bfloat16(), [drawn(*shape).float() for shape in [(4, IN), (OUT, 4)] * 2]
    weights = [drawn(*((IN, OUT) if transposed else (OUT, IN))).bfloat16() for _ in range(3)]
    dys, results = [drawn(ROWS, OUT).bfloat16() for _ in weights], []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [leaf.clone().requires_grad_() for leaf in (x.to(dtype), *factors)]
        lows = [LowRank(leaves[1], leaves[2], 2.0, dropout), LowRank(leaves[3], leaves[4], 0.5, dropout), None]
        group = [Adapted(W.to(dtype), None, low, transposed) for W, low in zip(weights, lows, strict=True)]
        torch.manual_seed(3)
        with activate({choices.fp32_name(side): 1 for W in weights for side in (W, W.t())}):
            with Widths() as widths:  # type: ignore[no-untyped-call]
                ys = linears(leaves[0], group)
            assert widths.widened.count((ROWS, IN)) == (dtype == torch.bfloat16)  # once for all three
            with widths:  # type: ignore[attr-defined]
                grads = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
        assert widths.seen == {torch.float32}
        assert all(t.dtype == dtype for t in (*ys, grads[0]))
        results.append((*ys, *grads))
    for wide, narrow in zip(*results, strict=True):  # the computed values are equal; only the results are rounded
        torch.testing.assert_close(
            narrow, wide.to(narrow.dtype), rtol=2**-8 if narrow.dtype != torch.float32 else 1e-5, atol=1e-4
        )


def test_what_gate_and_up_gave_is_made_again_to_the_bit_in_fp32() -> None:
    x, results = drawn(ROWS, IN).bfloat16(), []
    shapes = [(OUT, IN), (OUT, IN), (IN, OUT)]
    weights = [(drawn(*shape) / 5).bfloat16() for shape in shapes]
    factors = [drawn(*size).float() for out, into in shapes for size in ((4, into), (out, 4))]
    for keep in (True, False):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *factors)]
        lows = [LowRank(A, B, 0.5, p) for A, B, p in zip(leaves[1::2], leaves[2::2], (0.0, 0.2, 0.2), strict=True)]
        gate, up, down = (Adapted(W, None, low) for W, low in zip(weights, lows, strict=True))
        torch.manual_seed(3)
        with activate({choices.fp32_name(side): 1 for W in weights for side in (W, W.t())}), Widths() as widths:  # type: ignore[no-untyped-call]
            y = mlp(leaves[0], Form((gate, up), down, activation("silu"), None, True, keep=keep))
            y.backward(x)  # type: ignore[no-untyped-call]
        assert widths.seen == {torch.float32}
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(kept, made) for kept, made in zip(*results, strict=True))


class Widths(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the dtypes of matmul operands, and the shapes of tensors upcast to fp32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()
        self.widened: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.seen.add(args[-1].dtype)
        if func.overloadpacket is aten._to_copy and (kwargs or {}).get("dtype") == torch.float32:
            self.widened.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm)


def test_without_choices_a_product_is_one(counted: list[int]) -> None:
    x, right = drawn(ROWS, IN), drawn(IN, OUT)
    matmul(x, right)
    with activate({matmul_name(ROWS, right.t().contiguous().t()): 256}):  # other strides
        matmul(x, right)
    with activate({matmul_name(2000, right): 256}):  # another number of rows
        matmul(x, right)
    assert counted == [ROWS] * 3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapted_modules_have_the_same_values_and_gradients(
    transposed: bool, dropout: float, counted: list[int]
) -> None:
    W, bias, wanted = drawn(IN, OUT) if transposed else drawn(OUT, IN), drawn(OUT), []
    forward, backward = (W, W.t()) if transposed else (W.t(), W)
    chosen = {matmul_name(ROWS, forward): 256, matmul_name(ROWS, backward): 512}
    leaves = [drawn(ROWS, IN), drawn(4, IN), drawn(OUT, 4)]
    for acts in ({}, chosen):
        x, A, B = (leaf.clone().requires_grad_() for leaf in leaves)
        torch.manual_seed(3)
        counted.clear()
        with activate(acts):
            (y,) = linears(x, [Adapted(W, bias, LowRank(A, B, 2.0, dropout), transposed)])
            y.cos().sum().backward()  # type: ignore[no-untyped-call]
        assert (240 in counted and 352 in counted) == bool(acts)  # three slices forward, two backward
        wanted.append((y, x.grad, A.grad, B.grad))
    for plain, sliced in zip(*wanted, strict=True):
        torch.testing.assert_close(plain, sliced)


def test_choices_act_in_their_block_and_thread_alone() -> None:
    seen: list[dict[str, int]] = []
    with activate({"a": 1}):
        with activate({"b": 2}):
            assert dict(choices._ACTIVE.get()) == {"b": 2}
        assert dict(choices._ACTIVE.get()) == {"a": 1}
        other = threading.Thread(target=lambda: seen.append(dict(choices._ACTIVE.get())))
        other.start()
        other.join()
    assert dict(choices._ACTIVE.get()) == {}
    assert seen == [{}]


def test_a_backward_runs_under_the_choices_of_its_thread() -> None:
    seen: list[dict[str, int]] = []
    x = drawn(2).requires_grad_()
    x.register_hook(lambda _: seen.append(dict(choices._ACTIVE.get())))  # type: ignore[no-untyped-call]
    with activate({"a": 1}):
        x.sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [{"a": 1}]


def test_attention_goes_as_chosen_for_its_heads_and_length() -> None:
    q, v = drawn(1, 4, 300, 8), drawn(1, 2, 300, 8)
    name = choices.attention_name((4, 2, 8), q.dtype, True, 300)
    assert attention.chosen(q, v, Pattern()) == "matmul"
    with activate({name: 1}):
        assert attention.chosen(q, v, Pattern()) == "flash"
        assert attention.chosen(q, v, Pattern(causal=False)) == "matmul"
        assert attention.chosen(q, v, Pattern(sinks=torch.zeros(4))) == "flash"  # measured without sinks
        assert attention.chosen(q, v, Pattern(window=5)) == "matmul"  # not supported by flash
        assert attention.chosen(q, v, Pattern(segments=(150, 150))) == "matmul"  # shorter than any measured length
        assert attention.chosen(q, v, Pattern(method="matmul")) == "matmul"
        assert attention.chosen(q[:, :, :256], v[:, :, :256], Pattern()) == "flash"  # uses the same length
    long = torch.empty(1, 4, 2048, 8, dtype=q.dtype)
    with activate({choices.attention_name((4, 4, 8), q.dtype, True, 2048): 0}):
        assert attention.chosen(long, long, Pattern()) == "matmul"


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Pattern(window=70),
        Pattern(softcap=2.0),
        Pattern(segments=(300, 20)),
        Pattern(dropout=0.2),
        Pattern(sinks=torch.arange(4.0)),
    ],
)
def test_attention_through_fp32_has_the_values_and_gradients_of_bf16(pattern: Pattern) -> None:
    leaves, results = [drawn(1, heads, 320, 8).bfloat16() for heads in (4, 2, 2)], []
    name = choices.fp32_choice(choices.attention_name((4, 2, 8), torch.bfloat16, True, 320))
    for acts in ({}, {name: 1}):
        q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
        torch.manual_seed(0)
        with activate(acts), Widths() as widths:  # type: ignore[no-untyped-call]
            y = differentiable(q, k, v, pattern)
            y.cos().sum().backward()  # type: ignore[no-untyped-call]
        assert widths.seen == {torch.float32 if acts else torch.bfloat16}
        results.append([y, q.grad, k.grad, v.grad])
    exact = [leaf.clone().double().requires_grad_() for leaf in leaves]
    if not pattern.dropout:
        y = differentiable(*exact, pattern)
        y.cos().sum().backward()  # type: ignore[no-untyped-call]
        results[0] = [y, *(leaf.grad for leaf in exact)]
    for plain, through in zip(*results, strict=True):
        assert through.dtype == torch.bfloat16
        torch.testing.assert_close(through.double(), plain.double(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("sinks", [None, torch.arange(4.0)], ids=["no sinks", "sinks"])
def test_attention_by_either_way_is_the_same(sinks: torch.Tensor | None) -> None:
    leaves, results = [drawn(1, 4, 300, 8), drawn(1, 2, 300, 8), drawn(1, 2, 300, 8)], []
    for acts in ({}, {choices.attention_name((4, 2, 8), torch.float64, True, 300): 1}):
        q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
        with activate(acts):
            y = differentiable(q, k, v, Pattern(sinks=sinks))
            y.cos().sum().backward()  # type: ignore[no-untyped-call]
        results.append((y, q.grad, k.grad, v.grad))
    for plain, flash in zip(*results, strict=True):
        torch.testing.assert_close(plain, flash)
