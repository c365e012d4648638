"""Fused head and cross-entropy: the loss and every gradient equal those of logits and F.cross_entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.ops.choices import slices
from lorakit.ops.cross_entropy import Head, chunk_rows, linear_cross_entropy
from lorakit.ops.reference import cross_entropy as reference

D = torch.float64
WIDTH, VOCABULARY = 7, 11
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 1.5},
    "scaled, then capped": {"scale": 1.7, "softcap": 2.0},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(n: int, dtype: torch.dtype = D, *, bias: bool = False, **settings: Any) -> tuple[Tensor, Head, Tensor]:
    """Return hidden states, head and labels; a third of the rows has no label, including the first."""
    g = torch.Generator().manual_seed(n)
    W, b = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=D), torch.randn(VOCABULARY, generator=g, dtype=D)
    h = torch.randn(n, WIDTH, generator=g, dtype=D).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (n,), generator=g)
    labels[::3] = -100
    return h, Head(W.to(dtype), b.to(dtype) if bias else None, **settings), labels


def grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 1.5, inputs)]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("chunk", [None, 1, 3, 16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_it_is_the_formula(name: str, bias: bool, chunk: int | None) -> None:
    """Compute formula (75) directly."""
    h, head, labels = made(20, bias=bias, **HEADS[name])
    z = (h @ head.W.T + (0 if head.bias is None else head.bias)) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    kept = labels != -100
    written = (z.logsumexp(1) - z.gather(1, labels.clamp_min(0)[:, None])[:, 0])[kept].sum() / kept.sum()
    truth = grads(written, h)
    for loss in (linear_cross_entropy(h, head, labels, chunk=chunk), reference(h, head, labels)):
        for one, other in zip(grads(loss, h), truth, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    assert not grads(linear_cross_entropy(h, head, labels), h)[1][::3].any()


@pytest.mark.parametrize("name", HEADS)
def test_gradcheck(name: str) -> None:
    h, head, labels = made(5, bias=True, **HEADS[name])
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, head, labels, total=2.0, chunk=2), (h,))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", HEADS)
def test_narrow_dtypes_are_as_near_to_the_truth_as_the_reference(name: str, dtype: torch.dtype, bound: float) -> None:
    """Loss and gradient: the error from float64 is at most 1.5 times the reference's plus `bound`/2."""
    h, head, labels = made(301, dtype, bias=True, **HEADS[name])
    doubled = replace(head, W=head.W.double(), bias=head.bias.double())  # type: ignore[union-attr]
    exact = h.detach().double().requires_grad_()
    truth = grads(reference(exact, doubled, labels), exact)
    found = grads(linear_cross_entropy(h, head, labels, total=200, chunk=48), h)
    plain = grads(reference(h, head, labels, total=200), h)
    assert [t.dtype for t in found] == [torch.float32, dtype]
    for one, other, true in zip(found, plain, truth, strict=True):
        assert error(one, true) <= min(1.5 * error(other, true) + bound / 2, 2 * bound)


def test_a_label_without_probability_has_a_finite_loss() -> None:
    """exp(−200) is not representable in fp32, and the loss is still 200."""
    W = torch.eye(3)
    h = torch.tensor([[200.0, 0, 0], [0, 0, 0]], requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = h.to(dtype)
        loss = linear_cross_entropy(x, Head(W.to(dtype)), torch.tensor([1, 1]), total=1)
        assert loss.item() == pytest.approx(200 + torch.tensor(3.0).log().item(), rel=1e-6)
        (grad,) = torch.autograd.grad(loss, h)
        assert torch.allclose(grad, torch.tensor([[1.0, -1, 0], [1 / 3, -2 / 3, 1 / 3]]), atol=2e-3)


def test_a_sure_label_keeps_its_small_gradient() -> None:
    """p − 1 is rounded, not p: in bf16, p would be 1 and the gradient 0."""
    h, W = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True), torch.tensor([[1.0], [0.0]])
    loss = linear_cross_entropy(h, Head(W.bfloat16()), torch.tensor([0]))
    p = torch.sigmoid(torch.tensor(7.0))
    assert torch.autograd.grad(loss, h)[0].item() == pytest.approx((p - 1).item(), rel=4e-3)
    assert loss.item() == pytest.approx(-p.log().item(), rel=1e-3)


def test_any_leading_shape_stride_and_number_of_rows() -> None:
    h, head, labels = made(24)
    truth = grads(reference(h, head, labels), h)
    spread = torch.empty(24, 2 * WIDTH, dtype=D)
    spread[:, ::2] = h.detach()
    wide = spread[:, ::2].requires_grad_()
    columns = replace(head, W=head.W.t().contiguous().t())
    for one, other in zip(grads(linear_cross_entropy(wide, columns, labels), wide), truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    folded = linear_cross_entropy(h.view(2, 3, 4, WIDTH), head, labels.view(2, 3, 4).int())
    assert torch.allclose(grads(folded, h)[1], truth[1], rtol=1e-12, atol=1e-14)
    alone = linear_cross_entropy(h[1:2], head, labels[1:2])
    assert torch.allclose(alone, F.cross_entropy(h[1:2] @ head.W.T, labels[1:2]), rtol=1e-12)


def test_total_divides_and_no_trained_row_gives_the_references_nan() -> None:
    h, head, labels = made(20)
    mean = linear_cross_entropy(h, head, labels)
    for total in (7, 7.0, torch.tensor(7.0)):
        assert torch.allclose(linear_cross_entropy(h, head, labels, total=total) * 7, mean * 13)
    nothing = torch.full((20,), -100)
    loss, grad = grads(linear_cross_entropy(h, head, nothing), h)
    assert loss.isnan()
    assert reference(h, head, nothing).isnan()
    loss, grad = grads(linear_cross_entropy(h, head, nothing, total=4), h)
    assert loss == 0
    assert not grad.any()
    other = torch.where(labels == -100, -1, labels)
    assert torch.equal(linear_cross_entropy(h, head, other, ignore_index=-1), mean)


def test_two_backwards_give_the_same() -> None:
    h, head, labels = made(20)
    loss = linear_cross_entropy(h, head, labels)
    first = torch.autograd.grad(loss, h, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, h)[0], first)


def test_what_is_saved() -> None:
    """The hidden states, the gradient of the rows with loss and their positions; no positions if all rows have one."""
    h, head, labels = made(20, torch.bfloat16)
    of_h = 20 * WIDTH * 2
    for targets, expected in ((labels, of_h + 13 * WIDTH * 2 + 13 * 8), (labels.clamp_min(0), 2 * of_h)):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t.nbytes) or t, lambda t: t):  # type: ignore[misc]
            linear_cross_entropy(h, head, targets, total=1)
        assert sum(saved) == expected


def test_no_more_logits_than_those_of_a_chunk_exist_at_a_time() -> None:
    h, W = torch.randn(64, 4, dtype=torch.bfloat16, requires_grad=True), torch.randn(1000, 4, dtype=torch.bfloat16)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_cross_entropy(h, Head(W), torch.arange(64), chunk=16).backward()
    assert largest == 16 * 1000


def test_without_gradients_no_second_product_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    h, head, labels = made(20)
    with_gradient = linear_cross_entropy(h, head, labels)
    products: list[tuple[int, ...]] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(tuple(out.shape)) or mm(a, b, out=out))  # type: ignore[func-returns-value]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(linear_cross_entropy(h, head, labels), with_gradient)
    assert torch.equal(linear_cross_entropy(h.detach(), head, labels), with_gradient)
    assert products == [(13, VOCABULARY)] * 3


def test_under_autocast_products_run_in_its_dtype() -> None:
    h, head, labels = made(20, torch.float32, bias=True)
    narrow = replace(head, W=head.W.bfloat16(), bias=head.bias.bfloat16())  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        found = grads(linear_cross_entropy(h, head, labels), h)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(h, head, labels), found[0])
    truth = grads(linear_cross_entropy(h.bfloat16(), narrow, labels), h)
    assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda labels: labels.clone(),
    "every second": lambda labels: torch.stack([labels, torch.full_like(labels, 10**6)], 1)[:, 0],
    "shifted": lambda labels: torch.cat([torch.full_like(labels[:, :1], 10**6), labels], 1)[:, 1:],
    "transposed": lambda labels: labels.t().contiguous().t(),
}
"""A position far beyond the end of a row, with a million elements in between."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ignored", [False, True])
def test_labels_of_any_layout(dtype: torch.dtype, integer: torch.dtype, layout: str, ignored: bool) -> None:
    h, head, labels = made(24, dtype)
    labels = (labels if ignored else labels.clamp_min(0)).to(integer)
    plain = grads(linear_cross_entropy(h, head, labels.long()), h)
    if layout == "every second":
        asked = LAYOUTS[layout](labels)
        found = grads(linear_cross_entropy(h, head, asked), h)
    else:
        asked = LAYOUTS[layout](labels.view(4, 6))
        found = grads(linear_cross_entropy(h.view(4, 6, WIDTH), head, asked), h)
    assert asked.is_contiguous() == (layout == "contiguous")
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    exact = h.detach().double().requires_grad_()
    truth = reference(exact, Head(head.W.double()), labels.long())
    assert error(found[0], truth.detach()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1, 11, 2**40, -(2**40)])
def test_one_strided_label_out_of_range_is_rejected(dtype: torch.dtype, wrong: int) -> None:
    h, head, labels = made(24, dtype)
    strided = LAYOUTS["every second"](labels.clamp_min(0))
    strided[7] = wrong
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(h, head, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_labels_that_are_not_integers_are_rejected(dtype: torch.dtype) -> None:
    h, head, labels = made(24, torch.float32)
    with pytest.raises(ValueError, match="labels must be integers"):
        linear_cross_entropy(h, head, labels.clamp_min(0).to(dtype))


def test_chunks_are_of_about_equal_size() -> None:
    assert [part.stop - part.start for part in slices(300, 256)] == [160, 140]
    assert list(slices(0, 256)) == []
    assert chunk_rows(torch.empty(49152, 1, dtype=torch.bfloat16)) == 256
    assert chunk_rows(torch.empty(151936, 1, dtype=torch.bfloat16)) == 160
    assert chunk_rows(torch.empty(10_000_000, 1, dtype=torch.bfloat16)) == 16
    assert chunk_rows(torch.empty(49152, 1, dtype=torch.bfloat16, device="meta")) == 2720


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, "shape (20,), one per row of h; got (3,)"),
        ({"labels": torch.full((20,), 11)}, "labels must be in 0..10 or -100"),
        ({"labels": torch.full((20,), -1)}, "labels must be in 0..10 or -100"),
        ({"W": torch.zeros(11, 7)}, "head: W is torch.float32, but h is torch.float64; cast h"),
        ({"bias": torch.zeros(11, dtype=D, requires_grad=True)}, "W or bias requires a gradient"),
        ({"W": torch.zeros(11, 7, dtype=D, requires_grad=True)}, "W or bias requires a gradient"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    h, head, labels = made(20)
    head = replace(head, **{key: change.pop(key) for key in ("W", "bias", "softcap") if key in change})
    with pytest.raises(ValueError) as raised:
        linear_cross_entropy(h, head, change.pop("labels", labels), **change)
    assert said in str(raised.value)
