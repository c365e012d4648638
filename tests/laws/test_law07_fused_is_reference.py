"""Law 7: a fused operation equals its reference, in value and in every gradient, and its gradients are derivatives.

One table of operations, in double precision: `gradcheck` compares the backward with finite differences of the forward,
and value and gradients are compared with the plain PyTorch reference of each operation. Lower precisions, saved tensors
and rejected inputs are tested in tests/ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit.ops
from lorakit.ops import (
    activation,
    attention_block,
    cross_entropy,
    dropout,
    grouped_linear,
    int8,
    int8_weight,
    linear,
    mlp,
    norm,
    rotary,
    segments,
)
from lorakit.ops import reference as references
from lorakit.ops.adapted import Adapted, LowRank
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.norm import Norm

from .tolerances import RELATIVE

D = torch.float64
BOUND = 10 * RELATIVE[D]

BOUND_FP32 = 10 * RELATIVE[torch.float32]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A fused operation and its reference over the same tensors.

    Attributes:
        fused, plain: Tensors that require gradients -> one tensor or several.
        inputs: These tensors.
    """

    fused: Function
    plain: Function
    inputs: tuple[Tensor, ...]


def normal(*shape: int, seed: int = 0, trained: bool = False) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 31 * seed), dtype=D)
    return drawn.requires_grad_(trained)


def site(out: int, width: int, r: int = 2, *, transposed: bool = False, p: float = 0.0, seed: int = 0) -> Adapted:
    """Return a frozen weight of this shape with a bias, and an adapter whose B is not zero if r > 0."""
    W = normal(*((width, out) if transposed else (out, width)), seed=seed) / width**0.5
    A, B = normal(max(r, 1), width, seed=seed + 1, trained=True), normal(out, max(r, 1), seed=seed + 2, trained=True)
    return Adapted(W, normal(out, seed=seed + 3), LowRank(A, B, 0.7, p) if r else None, transposed)


def trained(*sites: Adapted) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in linear.factors(sites) if tensor is not None)


def a_group(*sites: Adapted) -> Case:
    x = normal(2, 3, 5, trained=True)

    def fused(x: Tensor, *_: Tensor) -> Any:
        torch.manual_seed(3)
        return linear.linears(x, sites)

    def plain(x: Tensor, *_: Tensor) -> Any:
        torch.manual_seed(3)
        masks: list[Tensor | None] = []
        for one in sites:
            if one.low is None or one.low.p == 0:
                masks.append(None)
            else:
                masks.append(dropout.zero_(torch.ones(x.shape, dtype=D), dropout.draw(x, one.low.p), one.low.p))
        return tuple(references.linear(x, sites, masks))

    return Case(fused, plain, (x, *trained(*sites)))


def a_dropout() -> Case:
    x = normal(4, 6, trained=True)

    def fused(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return dropout.dropout(x, 0.4)

    def plain(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        keep = dropout.zero_(torch.ones(x.shape, dtype=D), dropout.draw(x, 0.4), 0.4)
        return references.dropout(x, 0.4, keep)

    return Case(fused, plain, (x,))


def a_norm(kind: Any, **words: Any) -> Case:
    own = Norm(kind, normal(5, seed=1), words.pop("bias", None), 1e-5, **words)
    return Case(lambda x: norm.normalize(x, own), lambda x: references.norm(x, own), (normal(2, 3, 5, trained=True),))


def an_activation(name: str) -> Case:
    """Return a feed-forward block of two modules: an activation alone has no autograd function."""
    return an_mlp(name, site(6, 5), down=site(5, 6, seed=7))


def an_mlp(act: str, *inner: Adapted, down: Adapted, own: Norm | None = None, residual: bool = False) -> Case:
    form = mlp.Form(inner, down, activation.activation(act), own, residual)

    x = normal(2, 2, 5, trained=True)
    return Case(lambda x, *_: mlp.mlp(x, form), lambda x, *_: references.mlp(x, form), (x, *trained(*inner, down)))


def tables(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(tokens), 0.7 ** torch.arange(width // 2)).to(D).repeat(1, 2)
    return angles.cos(), angles.sin()


def a_block(pattern: Pattern, *, fused_projection: bool = False, norms: bool = False, residual: bool = True) -> Case:
    inputs = (site(16, 5),) if fused_projection else (site(8, 5), site(4, 5, seed=3), site(4, 5, 0, seed=6))
    own = [Norm("rms", normal(size, seed=size)) for size in (5, 4, 4)] if norms else [None] * 3
    block = attention_block.SelfAttention(inputs, site(5, 8, seed=9), 4, 1, *own)
    turn = rotary.Rotary(*tables(5, 4))
    x = normal(2, 5, 5, trained=True)
    return Case(
        lambda x, *_: attention_block.attention_block(x, block, pattern, turn, residual),
        lambda x, *_: references.attention_block(x, block, pattern, turn, residual),
        (x, *trained(*block.projections)),
    )


def a_loss(**words: Any) -> Case:
    chunk = words.pop("chunk", None)
    head, labels = cross_entropy.Head(normal(9, 5, seed=2), **words), torch.tensor([[0, -100, 8], [3, 3, -100]])
    return Case(
        lambda h: cross_entropy.linear_cross_entropy(h, head, labels, chunk=chunk),
        lambda h: references.cross_entropy(h, head, labels),
        (normal(2, 3, 5, trained=True),),
    )


def segments_by(method: Any) -> Case:
    index, scales = torch.tensor([1, -1, 0, 1]), torch.tensor([0.5, 2.0], dtype=D)
    given = (
        normal(4, 3, 5, trained=True),
        normal(2, 2, 5, seed=1, trained=True),
        normal(2, 6, 2, seed=2, trained=True),
    )
    return Case(
        lambda x, A, B: segments.segmented(x, A, B, scales, index, method=method),
        lambda x, A, B: references.segments(x, A, B, scales, index),
        given,
    )


def a_grouping(*, in_first: bool) -> Case:
    sizes = (3, 5, 6) if in_first else (3, 6, 5)
    frozen, counts = grouped_linear.GroupedLinear(normal(*sizes), normal(3, 6, seed=1), in_first), (2, 0, 3)
    given = (normal(5, 5, trained=True), normal(3, 2, 5, seed=2, trained=True), normal(3, 6, 2, seed=3, trained=True))

    def by(function: Function) -> Function:
        return lambda x, A, B: function(x, counts, frozen, [grouped_linear.GroupedLowRank(A, B, 0.7)])

    return Case(by(grouped_linear.grouped_linear), by(references.grouped_linear), given)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: a_group(site(4, 5)),
    "linear: transposed": lambda: a_group(site(4, 5, transposed=True)),
    "linear: q, k, v": lambda: a_group(site(6, 5), site(3, 5, 1, seed=4), site(3, 5, 0, seed=8)),
    "linear: with dropout": lambda: a_group(site(6, 5, p=0.3), site(3, 5, seed=4), site(3, 5, p=0.5, seed=8)),
    "grouped_linear": lambda: a_grouping(in_first=False),
    "grouped_linear: in first": lambda: a_grouping(in_first=True),
    "dropout": a_dropout,
    "norm: rms": lambda: a_norm("rms"),
    "norm: rms from zero": lambda: a_norm("rms", offset=1.0),
    "norm: layer": lambda: a_norm("layer", bias=normal(5, seed=4)),
    **{f"activation: {name}": lambda name=name: an_activation(name) for name in activation.ACTIVATIONS},
    "mlp: gated": lambda: an_mlp(
        "silu", site(6, 5), site(6, 5, seed=4), down=site(5, 6, seed=8), own=Norm("rms", normal(5)), residual=True
    ),
    "mlp: plain": lambda: an_mlp(
        "gelu_tanh",
        site(6, 5, transposed=True),
        down=site(5, 6, transposed=True, seed=8),
        own=Norm("layer", normal(5), normal(5, seed=1)),
        residual=True,
    ),
    "block: q, k, v": lambda: a_block(Pattern()),
    "block: one projection": lambda: a_block(Pattern(scale=0.3), fused_projection=True, residual=False),
    "block: norms, packed": lambda: a_block(Pattern(segments=(2, 3)), norms=True),
    "cross-entropy": a_loss,
    "cross-entropy: chunks, scale": lambda: a_loss(chunk=2, bias=normal(9, seed=5), scale=0.25),
    "cross-entropy: soft-cap": lambda: a_loss(softcap=1.5),
    **{f"segments: {method}": lambda method=method: segments_by(method) for method in ("masked", "rows", "sorted")},
}


def an_int8_group(*ranks: int) -> Case:
    """Return modules with int8 weights that share an input: without ranks, one module without an adapter."""
    x = normal(2, 3, 12, trained=True).detach().float().requires_grad_()
    dense = [normal(out, 12, seed=out).float() for out in (6, 4)[: max(len(ranks), 1)]]
    gain, kept = int8_weight.input_scales(x.detach().abs().flatten(0, 1).amax(0), dense, 2)
    weights = [int8_weight.quantize_weight(W, gain, kept) for W in dense]
    if not ranks:
        return Case(lambda x: int8.int8_linear(x, weights[0]), lambda x: references.int8(x, weights[0]), (x,))
    group = []
    for W, r in zip(weights, ranks, strict=True):
        A, B = (normal(*shape, seed=r).float().requires_grad_() for shape in ((r, 12), (len(W.q), r)))
        group.append(Adapted(W, normal(len(W.q), seed=3).float(), LowRank(A, B, 0.7)))
    return Case(
        lambda x, *_: linear.linears(x, group), lambda x, *_: references.linear(x, group), (x, *trained(*group))
    )


INT8_CASES: dict[str, Callable[[], Case]] = {
    "int8: alone": an_int8_group,
    "int8: a group": lambda: an_int8_group(2, 3),
}
"""Operations in fp32 whose gradients are not derivatives: rounding to integers has none, and it is passed over."""


def several(made: Any) -> Sequence[Tensor]:
    return made if isinstance(made, (tuple, list)) else (made,)


def gradients(made: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of a weighted sum of all outputs; the weights break symmetries."""
    weights = [torch.cos(torch.arange(y.numel(), dtype=D) + i).view(y.shape) for i, y in enumerate(made)]
    total = torch.stack([(y * w).sum() for y, w in zip(made, weights, strict=True)]).sum()
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


@pytest.mark.parametrize("name", [*CASES, *INT8_CASES])
def test_value_and_every_gradient_are_the_references(name: str) -> None:
    case, bound = (CASES[name](), BOUND) if name in CASES else (INT8_CASES[name](), BOUND_FP32)
    ours, theirs = several(case.fused(*case.inputs)), several(case.plain(*case.inputs))
    pairs = [*zip(ours, theirs, strict=True)]
    pairs += zip(gradients(ours, case.inputs), gradients(theirs, case.inputs), strict=True)
    for i, (found, wanted) in enumerate(pairs):
        assert found is not None and wanted is not None, f"{i}: no gradient"
        assert found.shape == wanted.shape
        found, wanted = found.detach(), wanted.detach()
        assert float((found - wanted).abs().max()) <= bound * max(1.0, float(wanted.abs().max())), i
        assert float(wanted.abs().max()) > 0, f"{i}: all zero, which proves nothing"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_derivatives(name: str) -> None:
    case = CASES[name]()
    assert torch.autograd.gradcheck(case.fused, case.inputs)


def dropping(form: mlp.Form) -> Case:
    x = normal(2, 2, 5, trained=True)

    def fused(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return mlp.mlp(x, form)

    return Case(fused, fused, (x, *trained(*form.inner, form.down)))


def attending(pattern: Pattern, block: attention_block.SelfAttention, wanted: Tensor | None = None) -> Case:
    x = normal(2, 5, 5, trained=True)

    def fused(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_block.attention_block(x, block, pattern, rotary.Rotary(*tables(5, 4)), True, wanted)

    return Case(fused, fused, (x, *trained(*block.projections)))


def a_bare_block(**words: Any) -> attention_block.SelfAttention:
    inputs = tuple(site(8, 5, seed=i, p=0.3) for i in (0, 4, 8))
    return attention_block.SelfAttention(inputs, site(5, 8, seed=9, p=0.3), 4, 2, **words)


BARE = mlp.Form((site(6, 5), site(6, 5, seed=4)), site(5, 6, seed=8), activation.activation("silu"), None, True)
RMS_OF_HEADS = {name: Norm("rms", normal(4)) for name in ("q_norm", "k_norm")}
WITH_RECORDS: dict[str, Callable[[], Case]] = {
    "mlp: dropout": lambda: dropping(BARE._replace(dropout=0.4, within=0.3)),
    "mlp: recomputed": lambda: dropping(BARE._replace(norm=Norm("rms", normal(5)), keep=False)),
    "mlp: fused": lambda: dropping(BARE._replace(inner=(site(12, 5, p=0.3),), fused=True)),
    "block: dropout": lambda: attending(Pattern(dropout=0.3), a_bare_block(dropout=0.4)),
    "block: norms of q and k": lambda: attending(Pattern(), a_bare_block(**RMS_OF_HEADS)),
    "block: some rows": lambda: attending(
        Pattern(), a_bare_block(norm=Norm("rms", normal(5)), dropout=0.4), torch.tensor([1, 2, 7])
    ),
}
"""Operations that draw dropout or compute some rows only: their gradients are compared with differences alone."""

FROZEN: dict[str, Callable[[int, int], bool]] = {
    "nothing": lambda at, count: False,
    "A": lambda at, count: at % 2 == 1,
    "B": lambda at, count: at > 0 and at % 2 == 0,
    "the factors": lambda at, count: at > 0,
    "the input": lambda at, count: at == 0,
    "all but the last factor": lambda at, count: at < count - 1,
    "all but one factor before": lambda at, count: at != 2,
}
"""Frozen inputs (the first is x, then A and B in turn): they decide what is saved for the backward pass."""

HAVE_FACTORS = ("linear", "grouped_linear", "mlp", "block")
AGAIN = [
    (name, frozen)
    for name in (*CASES, *WITH_RECORDS)
    for frozen in (FROZEN if name.partition(":")[0] in HAVE_FACTORS else ["nothing"])
]


@pytest.mark.parametrize(("name", "frozen"), AGAIN)
def test_gradients_can_be_differentiated_again(name: str, frozen: str) -> None:
    """Compare the derivatives of gradients with finite differences; none of them is constant by mistake."""
    case = {**CASES, **WITH_RECORDS}[name]()
    states = [tensor.requires_grad for tensor in case.inputs]
    try:
        for at, tensor in enumerate(case.inputs):
            tensor.requires_grad_(not FROZEN[frozen](at, len(case.inputs)))
        assert torch.autograd.gradgradcheck(case.fused, case.inputs, fast_mode=True)
    finally:
        for tensor, state in zip(case.inputs, states, strict=True):
            tensor.requires_grad_(state)


def test_every_operation_with_a_reference_has_a_row() -> None:
    """Check that each module of `ops` with an autograd function has a reference and an entry in the table."""
    known = {name.partition(":")[0] for name in (*CASES, *INT8_CASES)}
    listed_as = {"attention_block": "block", "cross_entropy": "cross-entropy"}
    paths = [
        path for path in Path(lorakit.ops.__file__).parent.glob("*.py") if path.stem not in ("reference", "autograd")
    ]
    names = {path.stem for path in paths if "(torch.autograd.Function)" in path.read_text()}
    assert len(names) >= 7
    for name in names | {"activation"}:
        assert listed_as.get(name, name) in known, name
        assert hasattr(references, "ACTIVATIONS" if name == "activation" else name), name
