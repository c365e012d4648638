"""LoRA beside frozen linear modules: the fused function is its reference in value, in every gradient and in every dtype."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorakit.ops.dropout import zeroed
from lorakit.ops.linear import Adapted, LowRank, factors, linears, reference

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
    """What each module's dropout keeps, as the generator stands: they are drawn in the group's order."""
    masks: list[Tensor | None] = []
    for module in group:
        if module.low is None or module.low.p == 0:
            masks.append(None)
        else:
            mask = torch.ones(x.numel())
            mask[zeroed(x.numel(), module.low.p, "cpu")] = 0
            masks.append(mask.view(x.shape))
    return masks


def gradients(ys: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    loss = sum((y * torch.sin(torch.arange(y.numel()).view(y.shape) + i).to(y.dtype)).sum() for i, y in enumerate(ys))
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, inputs, allow_unused=True)]  # type: ignore[arg-type]


def both(x: Tensor, group: list[Adapted]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the fused function, and of the reference, with the same numbers dropped."""
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
    """Formula (71), in double precision."""
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


def test_weights_that_are_trained_are_refused() -> None:
    group = [Adapted(torch.ones(2, 3, requires_grad=True))]
    with pytest.raises(
        ValueError, match=r"a weight of shape \(2, 3\) asks for a gradient, .*; freeze it, or run the module"
    ):
        linears(torch.ones(1, 3), group)
    group = [Adapted(torch.ones(2, 3), torch.ones(2, requires_grad=True))]
    with pytest.raises(ValueError, match=r"a bias of shape \(2,\) asks for a gradient"):
        linears(torch.ones(1, 3), group)
    with torch.no_grad():
        assert linears(torch.ones(1, 3), group)[0].tolist() == [[4, 4]]
