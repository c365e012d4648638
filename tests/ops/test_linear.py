"""Frozen linear modules with LoRA: the fused function equals its reference in value, every gradient and dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.dropout import draw_record, positions
from lorakit.ops.linear import Group, linears
from lorakit.ops.reference import linear as reference

D = torch.float64
Spec = tuple[int, int, float, bool, bool]  # out, r (0: no adapter), dropout, transposed, bias
GROUPS: dict[str, list[Spec]] = {
    "one": [(5, 2, 0, False, True)],
    "rank one": [(3, 1, 0, False, False)],
    "conv1d": [(6, 3, 0, True, True)],
    "qkv": [(9, 3, 0, False, False), (4, 2, 0, False, True), (4, 5, 0, False, False)],
    "with a bare module": [(5, 2, 0, False, True), (3, 0, 0, False, True), (4, 0, 0, True, False)],
    "bare": [(5, 0, 0, False, True)],
    "one drops": [(5, 2, 0.3, False, True)],
    "all drop": [(5, 2, 0.3, False, True), (4, 1, 0.5, True, False), (3, 2, 0.1, False, False)],
    "mixed": [(5, 2, 0.3, False, True), (4, 3, 0, False, False), (6, 0, 0, False, True), (3, 1, 0.5, True, False)],
}


Counted = Callable[[], AbstractContextManager[Counter[str]]]


class _Counting(TorchDispatchMode):
    """Count the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted() -> Counted:
    @contextmanager
    def block() -> Iterator[Counter[str]]:
        with _Counting() as mode:
            yield mode.names

    return block


def made(specs: Sequence[Spec], width: int = 7, dtype: torch.dtype = D, master: torch.dtype = D) -> list[Adapted]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=D).to(dtype)

    group = []
    for out, r, p, transposed, bias in specs:
        W = normal(width, out, dtype=dtype) if transposed else normal(out, width, dtype=dtype)
        low = None
        if r:
            A, B = normal(r, width, dtype=master).requires_grad_(), normal(out, r, dtype=master).requires_grad_()
            low = LowRank(A, B, 0.7, p)
        group.append(Adapted(W / width**0.5, normal(out, dtype=dtype) if bias else None, low, transposed))
    return group


def keeps(x: Tensor, group: Sequence[Adapted]) -> list[Tensor | None]:
    """Return the dropout mask of each module from the generator's current state, in the group's order."""
    masks: list[Tensor | None] = []
    for module in group:
        if module.low is None or module.low.p == 0:
            masks.append(None)
        else:
            mask = torch.ones(x.numel())
            mask[positions(draw_record(x.numel(), module.low.p, x.device), x.numel(), module.low.p)] = 0
            masks.append(mask.view(x.shape))
    return masks


def deterministic(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def gradients(ys: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    loss = sum((y * torch.sin(torch.arange(y.numel()).view(y.shape) + i).to(y.dtype)).sum() for i, y in enumerate(ys))
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, inputs, allow_unused=True)]  # type: ignore[arg-type]


def both(x: Tensor, group: list[Adapted]) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and gradients of the fused function and of the reference, with the same dropped elements."""
    inputs = [t for t in (x, *factors(group)) if t is not None and t.requires_grad]
    torch.manual_seed(1)
    ys = list(linears(x, group))
    fused = [*ys, *gradients(ys, inputs)]
    torch.manual_seed(1)
    ys = reference(x, group, keeps(x, group))
    return fused, [*ys, *gradients(ys, inputs)]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 7), (7,)])
def test_it_is_the_formula(name: str, shape: tuple[int, ...]) -> None:
    """Compute formula (71) in double precision."""
    x = torch.randn(*shape, dtype=D, requires_grad=True)
    fused, plain = both(x, made(GROUPS[name]))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_gradcheck(name: str) -> None:
    group = made(GROUPS[name])
    inputs = [t for t in factors(group) if t is not None]

    def fused(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        return linears(x, group)

    assert torch.autograd.gradcheck(fused, (torch.randn(3, 7, dtype=D, requires_grad=True), *inputs))


MIXED: list[Spec] = [
    (33, 4, 0, False, True),
    (20, 1, 0, True, False),
    (17, 3, 0.3, False, True),
    (9, 0, 0, False, True),
]


@pytest.mark.parametrize("specs", [MIXED, [(33, 16, 0.1, False, True), (20, 8, 0.2, False, False)]])
def test_in_single_precision(specs: list[Spec]) -> None:
    x = deterministic((3, 11, 65), 1).float().requires_grad_()
    fused, plain = both(x, made(specs, 65, torch.float32, torch.float32))
    for a, b in zip(fused, plain, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("specs", [MIXED, [(33, 16, 0.1, False, True), (20, 8, 0.2, False, False)]])
def test_in_bf16_it_is_as_near_to_the_truth_as_plain_pytorch(specs: list[Spec]) -> None:
    """bf16 base, fp32 factors: the error of every result from double precision, with equally rounded inputs."""
    x = deterministic((5, 13, 65), 1).bfloat16().requires_grad_()
    group = made(specs, 65, torch.bfloat16, torch.float32)
    fused, plain = both(x, group)
    true_x, exact = x.detach().double().requires_grad_(), in_double(group)
    torch.manual_seed(1)
    ys = reference(true_x, exact, keeps(true_x, exact))
    truth = [*ys, *gradients(ys, [t for t in (true_x, *factors(exact)) if t is not None])]
    kinds = [torch.bfloat16] * (len(ys) + 1) + [torch.float32] * (len(truth) - len(ys) - 1)
    assert [t.dtype for t in fused] == kinds
    for a, b, true in zip(fused, plain, truth, strict=True):
        assert (a.double() - true).norm() <= 1.5 * (b.double() - true).norm() + 1e-3 * true.norm()
        assert (a.double() - true).norm() <= 0.01 * true.norm()


def in_double(group: Sequence[Adapted]) -> list[Adapted]:
    """Return the group with the same values in double precision."""
    exact = []
    for module in group:
        low = module.low
        if low is not None:
            A, B = (t.detach().double().requires_grad_() for t in (low.A, low.B))
            low = replace(low, A=A, B=B)
        bias = None if module.bias is None else module.bias.double()
        exact.append(replace(module, W=module.W.double(), bias=bias, low=low))
    return exact


@pytest.mark.parametrize("frozen", ["A", "B", "both", "x", "x and A"])
@pytest.mark.parametrize("name", ["qkv", "mixed", "all drop"])
def test_what_asks_for_no_gradient_gets_none_and_costs_none(name: str, frozen: str, counted: Counted) -> None:
    group = made(GROUPS[name])
    for module in group:
        if module.low is not None:
            module.low.A.requires_grad_(frozen not in ("A", "both", "x and A"))
            module.low.B.requires_grad_(frozen not in ("B", "both"))
    x = deterministic((4, 7), 1).requires_grad_("x" not in frozen)
    fused, plain = both(x, group)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ys = linears(x, group)
    kept_x = any(t.data_ptr() == x.data_ptr() for t in saved)
    assert kept_x == (frozen in ("B", "x"))
    low = [module for module in group if module.low is not None]
    with counted() as names:
        gradients(ys, [t for t in (x, *factors(group)) if t is not None and t.requires_grad])
    of_x = (len(group) + sum(m.low.p > 0 for m in low) + any(m.low.p == 0 for m in low)) * ("x" not in frozen)  # type: ignore[union-attr]
    trains_a, trains_b = frozen in ("B", "x"), frozen in ("A", "x", "x and A")
    of_a = (sum(m.low.p > 0 for m in low) + any(m.low.p == 0 for m in low)) * trains_a  # type: ignore[union-attr]
    thin = len(low) * (trains_a or "x" not in frozen)
    assert names["mm"] + names["addmm_"] == of_x + of_a + thin + len(low) * trains_b


def test_an_output_that_is_not_used_costs_nothing_and_gives_no_gradient() -> None:
    group = made(GROUPS["mixed"] + GROUPS["qkv"])
    x = deterministic((4, 7), 1).requires_grad_()
    ys = linears(x, group)
    flat = [t for t in factors(group) if t is not None]
    grads = torch.autograd.grad(ys[1].sum() + ys[5].sum(), [x, *flat], allow_unused=True)
    used = [g is not None for g in grads]
    assert used == [True, False, False, True, True, False, False, False, False, True, True, False, False]
    plain = reference(x, group)
    for a, b in zip(
        grads, torch.autograd.grad(plain[1].sum() + plain[5].sum(), [x, *flat], allow_unused=True), strict=True
    ):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_forward_takes_one_product_for_all_a(counted: Counted) -> None:
    """Without dropout: one matmul per weight, one with all A, one per B, accumulated in place."""
    group = made(GROUPS["qkv"], dtype=torch.bfloat16, master=torch.float32)
    with counted() as names, torch.no_grad():
        linears(deterministic((4, 7), 1).bfloat16(), group)
    assert names["mm"] + names["addmm"] == 3 + 1  # the second with a bias
    assert names["addmm_"] == 3
    assert names["add"] + names["add_"] + names["clone"] + names["copy_"] == 0


def test_it_saves_the_input_once_thin_products_and_a_byte_a_dropped_number() -> None:
    specs: list[Spec] = [(32, 4, 0, False, True), (24, 2, 0, False, False), (16, 3, 0.25, False, False)]
    group = made(specs, 64, torch.bfloat16, torch.float32)
    x = deterministic((2, 50, 64), 1).bfloat16().requires_grad_()
    lasting = {t.data_ptr() for t in (*factors(group), *(m.W for m in group), x) if t is not None}
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        torch.manual_seed(5)
        linears(x, group)
    fresh = [t for t in saved if t.data_ptr() not in lasting]
    assert sum(t.numel() * t.element_size() for t in fresh) == 100 * (4 + 2 + 3) * 2 + 8
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    assert x.data_ptr() in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_saves_nothing(block: type) -> None:
    group = made(GROUPS["qkv"])
    x = deterministic((2, 7), 1).requires_grad_()
    expected = reference(x, group)
    with block():
        ys = linears(x, group)
    assert all(y.grad_fn is None for y in ys)
    for a, b in zip(ys, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter() -> None:
    group = made(GROUPS["mixed"])
    wide = deterministic((3, 14, 5), 1).requires_grad_()
    x = wide[:, ::2].transpose(1, 2)  # (3, 5, 7)
    fused, plain = both(x, group)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.manual_seed(1)
    y = linears(x, group)[0]
    y.sum().backward()  # a gradient of stride 0
    assert wide.grad is not None


def test_outputs_may_be_changed_in_place() -> None:
    group = made(GROUPS["qkv"])
    x = deterministic((2, 3, 7), 1).requires_grad_()
    ys = linears(x, group)
    for y in ys:
        y.mul_(2)
    (grad,) = torch.autograd.grad(ys[0].sum(), x)
    (expected,) = torch.autograd.grad(reference(x, group)[0].sum() * 2, x)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_neither_the_input_nor_a_gradient_is_written_to() -> None:
    group = made(GROUPS["mixed"])
    x = deterministic((4, 7), 1).requires_grad_()
    dys = [deterministic((4, len(m.W) if not m.transposed else m.W.shape[1]), 2) for m in group]
    before = [t.clone() for t in (x, *dys)]
    torch.autograd.grad(linears(x, group), x, dys)
    for t, kept in zip((x, *dys), before, strict=True):
        assert torch.equal(t, kept)


def test_an_owned_input_gives_the_same_numbers() -> None:
    for name in ("mixed", "all drop", "qkv"):
        group = made(GROUPS[name])
        x = deterministic((4, 7), 1)
        dys = [deterministic((4, len(m.W) if not m.transposed else m.W.shape[1]), 2) for m in group]
        results = []
        for owned in (False, True):
            torch.manual_seed(1)
            with torch.no_grad():
                parts = Group(group, D)
                ys = parts.forward(x)
                dx, grads = Group.unpack(*parts.pack()).backward(x.clone(), dys, owned=owned)
                given = x.clone()
                again = Group.unpack(*parts.pack()).backward(given, dys, owned=owned)[0]
            assert again is not None
            assert (again.data_ptr() == given.data_ptr()) == owned  # an existing buffer is used
            results.append([*ys, dx, *(g for pair in grads for g in pair if g is not None)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_dropout_again(reentrant: bool) -> None:
    group = made(GROUPS["mixed"])
    flat = [t for t in factors(group) if t is not None]
    x = deterministic((4, 7), 1).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return sum((y * y).sum() for y in linears(x, group))  # type: ignore[return-value]

    torch.manual_seed(4)
    expected = torch.autograd.grad(loss(x), [x, *flat])
    torch.manual_seed(4)
    checkpoint(loss, x, use_reentrant=reentrant).backward()
    for t, grad in zip((x, *flat), expected, strict=True):
        assert t.grad is not None
        assert torch.equal(t.grad, grad)


def test_under_autocast_products_run_in_its_dtype() -> None:
    group = made(GROUPS["qkv"], dtype=torch.float32, master=torch.float32)
    x = deterministic((6, 7), 1).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ys = linears(x, group)
        plain = reference(x, group)
    for y, b in zip(ys, plain, strict=True):
        assert y.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(y, b, rtol=0.05, atol=0.05)
    grads = gradients(ys, [x, *(t for t in factors(group) if t is not None)])
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("name", ["qkv", "all drop"])
def test_it_compiles_as_one_graph(name: str) -> None:
    group = made(GROUPS[name])
    flat = [t for t in factors(group) if t is not None]
    x = deterministic((4, 7), 1).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return sum((y * y).sum() for y in linears(x, group))  # type: ignore[return-value]

    torch.compiler.reset()
    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    grads = torch.autograd.grad(value, [x, *flat])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    if name == "qkv":
        torch.testing.assert_close(value, loss(x), rtol=1e-12, atol=1e-12)
        for a, b in zip(grads, torch.autograd.grad(loss(x), [x, *flat]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qkv", "all drop"])
def test_a_fresh_adapter_leaves_the_base_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """With B = 0: elements are dropped only for the adapter, and adding zero does not round."""
    group = made(GROUPS[name], 64, dtype, torch.float32)
    x = deterministic((40, 64), 1).to(dtype)
    for module in group:
        module.low.B.data.zero_()  # type: ignore[union-attr]
    for y, module in zip(linears(x, group), group, strict=True):
        W = module.W.t() if module.transposed else module.W
        assert torch.equal(y, torch.nn.functional.linear(x, W, module.bias))


def test_a_dropout_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\); got 1\.0"):
        LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0, 1.0)


def test_weights_that_are_trained_are_refused() -> None:
    group = [Adapted(torch.ones(2, 3, requires_grad=True))]
    with pytest.raises(
        ValueError, match=r"a weight of shape \(2, 3\) requires a gradient, .*; freeze it or call the module"
    ):
        linears(torch.ones(1, 3), group)
    group = [Adapted(torch.ones(2, 3), torch.ones(2, requires_grad=True))]
    with pytest.raises(ValueError, match=r"a bias of shape \(2,\) requires a gradient"):
        linears(torch.ones(1, 3), group)
    with torch.no_grad():
        assert linears(torch.ones(1, 3), group)[0].tolist() == [[4, 4]]
