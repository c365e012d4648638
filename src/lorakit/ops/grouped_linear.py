"""Grouped linear modules with adapters, such as the projections of fused experts, as one autograd function.

Rows of the same group, such as the tokens that are routed to one expert, are adjacent. Each group has its own frozen
weight and factors A and B. No dense update is formed: the input and one (rows, r) activation per adapter are saved.

In bf16 and fp16 on a CPU, torch compiles a kernel for each new shape of a matmul, which takes as long as a matmul of a
hundred rows, and the rows of a group vary from batch to batch. The matmuls with frozen weights therefore also process
the first rows of the next group, up to a multiple of `STEP`, which are overwritten by the next group. The matmuls with
A and B run in fp32, which needs no kernels of its own and is more accurate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.autograd import (
    Context,
    Replayed,
    alias,
    autocast,
    edge_of,
    entered,
    is_traced,
    needs_gradient,
    with_replay,
    without_autocast,
)

STEP = 16
"""Matmuls in narrow dtypes on a CPU process a multiple of this number of rows, except for the last group."""

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class GroupedLowRank:
    """One adapter of all groups: its factors A (groups, r, in) and B (groups, out, r), and its scale."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class GroupedLinear:
    """Frozen linear modules: W (groups, out, in) or, if `in_first`, (groups, in, out), and bias (groups, out)."""

    W: Tensor
    bias: Tensor | None = None
    in_first: bool = False

    @property
    def out_features(self) -> int:
        """Return the output width."""
        return self.W.shape[2 if self.in_first else 1]

    @property
    def in_features(self) -> int:
        """Return the input width."""
        return self.W.shape[1 if self.in_first else 2]

    def weight(self, group: int, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) of a group in a dtype."""
        W = self.W[group].to(dtype)
        return W.mT if self.in_first else W

    def check_frozen(self) -> None:
        """Check that the weights are frozen.

        Raises:
            ValueError: A weight or bias requires a gradient.
        """
        for name, tensor in (("weights", self.W), ("bias", self.bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"grouped_linear: the {name} require a gradient; freeze them")


class _Form(NamedTuple):
    linear: GroupedLinear | None  # None computes the updates of the adapters alone
    counts: tuple[int, ...]
    scales: tuple[float, ...]


def grouped_linear(
    x: Tensor, counts: Sequence[int], linear: GroupedLinear | None, adapters: Sequence[GroupedLowRank] = ()
) -> Tensor:
    """Compute y = x·W_gᵀ + b_g + Σ s·(x·A_gᵀ)·B_gᵀ (N, out) for the rows of each group g. [docs/math.md (92)]

    Gradients flow to x (N, in), sorted by group, and to A and B, whose dtype may differ. `counts` has the rows of each
    group; without `linear`, only the sum over the adapters is computed. Matmuls use an autocast dtype.
    """
    if linear is not None and torch.is_grad_enabled():
        linear.check_frozen()
    x = autocast(x)
    form = _Form(linear, tuple(counts), tuple(adapter.scale for adapter in adapters))
    flat = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
    with without_autocast(x):
        if is_traced():
            return reference.grouped_linear(x, counts, linear, adapters)
        if needs_gradient(x, *flat):
            trained = [factor.requires_grad for factor in flat]
            # without gradients of A, x is not saved, but that of B depends on x
            edge = edge_of(x) if any(trained) and not any(trained[::2]) else None
            return _GroupedLinear.apply(x, form, edge, *flat)
        return _forward(x, form, [factor.to(_dtype_of_factors(x)) for factor in flat])[0]


def _groups(x: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, slice, slice]]:
    """Yield each group that has rows, its rows, and those that its matmul writes, perhaps some of the next group."""
    step, start = STEP if _is_narrow_on_cpu(x) else 1, 0
    for group, count in enumerate(counts):
        if count:
            yield group, slice(start, start + count), slice(start, min(start + count + -count % step, len(x)))
        start += count


def _is_narrow_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in NARROW


def _dtype_of_factors(x: Tensor) -> torch.dtype:
    """Return the dtype of the matmuls with A and B."""
    return torch.float32 if _is_narrow_on_cpu(x) else x.dtype


def _forward(x: Tensor, form: _Form, flat: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the output (N, out), and s·x·Aᵀ (N, r) in the dtype of the factors for each adapter."""
    linear = form.linear
    y = x.new_empty(len(x), flat[1].shape[1] if linear is None else linear.out_features)
    hidden = [A.new_empty(len(x), A.shape[1]) for A in flat[::2]]
    for group, rows, more in _groups(x, form.counts):
        if linear is None:
            y[rows].zero_()
        elif linear.bias is None:
            torch.mm(x[more], linear.weight(group, x.dtype).mT, out=y[more])
        else:
            torch.addmm(linear.bias[group].to(x.dtype), x[more], linear.weight(group, x.dtype).mT, out=y[more])
        part = x[rows].to(flat[0].dtype) if flat else x
        for h, A, B, scale in zip(hidden, flat[::2], flat[1::2], form.scales, strict=True):
            torch.mm(part, A[group].mT, out=h[rows]).mul_(scale)
            _add(y[rows], h[rows], B[group].mT)
    return y, hidden


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to a view of a matrix, which may have a narrower dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


_State = tuple[_Form, tuple[Tensor, ...], torch.Size, torch.dtype]
"""The form, the factors, and the shape and dtype of x."""


def _replay(ctx: Context[_State], saved: Sequence[Tensor]) -> Replayed:
    (form, flat, shape, dtype), (kept, edge, *rest) = ctx.state, saved
    factors = [alias(factor) for factor in flat]
    x = entered(kept, edge, shape, (dtype, saved[-1].device))
    low = [GroupedLowRank(*pair) for pair in zip(factors[::2], factors[1::2], form.scales, strict=True)]
    y = reference.grouped_linear(x, form.counts, form.linear, low, rest[: len(low)])
    return (x, None, None, *factors), (y,)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_State], x: Tensor, form: _Form, edge: Tensor | None, *factors: Tensor) -> Tensor:
        flat = [factor.to(_dtype_of_factors(x)) for factor in factors]
        y, hidden = _forward(x, form, flat)
        needs = ctx.needs_input_grad
        kept = x if any(needs[3::2]) else None
        saved = [h if needed else None for h, needed in zip(hidden, needs[4::2], strict=True)]
        ctx.state = form, factors, x.shape, x.dtype
        ctx.save_for_backward(kept, edge, *saved, *flat)
        return y

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_State], dy: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy):
            return _backward(ctx, dy.contiguous())


def _backward(ctx: Context[_State], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of `_GroupedLinear.forward`; dy is (N, out)."""
    (form, factors, *_), needs = ctx.state, ctx.needs_input_grad
    x, _, *rest = ctx.saved_tensors
    hidden, flat = rest[: len(form.scales)], rest[len(form.scales) :]
    linear = form.linear
    dx = dy.new_empty(len(dy), flat[0].shape[2] if linear is None else linear.in_features) if needs[0] else None
    grads = [
        torch.zeros_like(factor, dtype=of_caller.dtype) if needed else None
        for factor, of_caller, needed in zip(flat, factors, needs[3:], strict=True)
    ]
    for group, rows, more in _groups(dy, form.counts):
        if dx is not None and linear is not None:
            torch.mm(dy[more], linear.weight(group, dy.dtype), out=dx[more])
        elif dx is not None:
            dx[rows].zero_()
        if not flat:
            continue
        part = dy[rows].to(flat[0].dtype)
        entered = part if x is None else x[rows].to(part.dtype)  # x is saved only if a factor is trained
        for index, scale in enumerate(form.scales):
            A, B = flat[2 * index][group], flat[2 * index + 1][group]
            dA, dB = grads[2 * index], grads[2 * index + 1]
            if dB is not None:
                _multiply(part.mT, hidden[index][rows], dB[group])
            if dA is None and dx is None:
                continue
            dh = (part @ B).mul_(scale)
            if dA is not None:
                _multiply(dh.mT, entered, dA[group])
            if dx is not None:
                _add(dx[rows], dh, A)
    return dx, None, None, *grads


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the product of two matrices into a view of a matrix, which may have another dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
