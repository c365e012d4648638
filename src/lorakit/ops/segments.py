"""Rows that have adapters of their own, each with its own factors alone, in one call of a compiled kernel.

Of A and B nothing is read but what a row needs, and nothing is copied: a token of many rows with many adapters costs
the reading of their factors. No gradient is recorded. The plain way beside it is `lorakit.ops.segments.reference`.

Many adapters in one batch: every row runs with its own A and B, out of stacks that hold all of them.

With B transposed, forward and backward are the same three products: `shrink` from wide rows to thin, `expand` from thin
to wide, `outer` of both. There are ways to take them, with the same results. `masked` multiplies by all adapters at
once and blots out what is not a row's own: with few adapters the waste costs less than anything else. `rows` takes a
product for each row, with copies of its factors: for rows of many tokens, and for many adapters. `sorted` puts the rows
of one adapter together and takes one product for each: for many short rows, and for one adapter. `compiled` reads each
row's factors where they lie, in one kernel for shrink and expand: for few short rows, where no gradient is recorded and
there is such a kernel (`lorakit.ops.segments`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.ops.adapted import as_written, autocast
from lorakit.ops.kernels.choosing import kernels_for
from lorakit.ops.kernels.protocol import OwnProducts


def own_products(x: Tensor, A: Tensor, Bt: Tensor) -> OwnProducts | None:
    """The kernel for rows like x (rows, …, in) with A (K, r, in) and Bt (K, r, out); None where there is none."""
    kernels = kernels_for(x, A, Bt, strided=True)
    return None if kernels is None else kernels.own


class OwnRows:
    """s_k·B_k·(A_k·x_i) for each row and its adapter, made ready for any number of calls.   [docs/math.md (72)]

    A (K, r, in) with the scales in it, Bt (K, r, out), index (rows,) with −1 for no adapter, which is in bounds.
    """

    def __init__(self, A: Tensor, Bt: Tensor, index: Tensor, products: OwnProducts) -> None:
        self.A, self.Bt, self.index, self.products = A, Bt, index.long().contiguous(), products

    def forward(self, x: Tensor, into: Tensor | None) -> tuple[Tensor, None]:
        """The result (rows, …, out) for x (rows, …, in), added to `into` in place where that is given.

        Returns:
            The result, and nothing that a backward could need.
        """
        if into is not None and into.dtype == x.dtype and into.is_contiguous():
            room = into
        else:
            room = x.new_zeros(*x.shape[:-1], self.Bt.shape[2])
        if x.numel():
            self.products.add_own(x.contiguous(), self.A, self.Bt, self.index, room)
        return room if into is None or room is into else into.add_(room), None


Way = Literal["masked", "rows", "sorted", "compiled"]
LONG_ROW = 4  # tokens from which a row fills products of its own
LONG_RUN, FULL_RUN = 32, 8  # rows of an adapter from which its products are full; from which they beat single rows
FEW_ADAPTERS = 16  # up to here a product with all of them is no dearer than copies of each row's own


@dataclass(frozen=True, eq=False)
class Routed:
    """Which adapter each row uses, index (rows,), −1 for none: made once for a forward, used by every layer.

    Raises:
        ValueError: The index does not hold integers, or a row asks for an adapter that there is not.
    """

    index: Tensor
    adapters: int

    def __post_init__(self) -> None:
        if self.index.is_floating_point() or self.index.is_complex() or self.index.dtype == torch.bool:
            raise ValueError(f"the index of rows must hold integers; got {self.index.dtype}")
        asked = self.index.tolist()
        strange = sorted({k for k in asked if not -1 <= k < self.adapters})
        if strange:
            raise ValueError(
                f"rows ask for the adapters {strange}, and there are 0 to {self.adapters - 1}, or -1 for none"
            )

    @cached_property
    def own(self) -> Tensor:
        """One where the adapter is the row's own (rows, adapters), fp32."""
        return (self.index[:, None] == torch.arange(self.adapters, device=self.index.device)).float()

    @cached_property
    def in_place(self) -> bool:
        """Whether each adapter has one row, in the adapters' order, whatever rows without one stand between."""
        return [k for k in self.index.tolist() if k >= 0] == list(range(self.adapters))

    @cached_property
    def served(self) -> Tensor | None:
        """The rows that have an adapter (served,); None for all."""
        return None if bool((self.index >= 0).all()) else (self.index >= 0).nonzero().flatten()

    @cached_property
    def order(self) -> Tensor | None:
        """The rows that have an adapter, those of one beside one another (served,); None for all as they stand."""
        if self.served is None and bool((self.index.diff() >= 0).all()):
            return None
        return self.index.argsort(stable=True)[len(self.index) - int((self.index >= 0).sum()) :]

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """In that order, for each adapter that has rows: the adapter, its first row, the row after its last."""
        found, end = [], 0
        for k, n in enumerate(torch.bincount(self.index + 1, minlength=self.adapters + 1).tolist()[1:]):
            found += [(k, end, end + n)] if n else []
            end += n
        return found


def reference(x: Tensor, A: Tensor, B: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """What `segmented` computes, (rows, …, out), row by row in plain PyTorch."""
    rows = []
    for row, k in zip(x, index.tolist(), strict=True):
        if k < 0:
            rows.append(row.new_zeros(*row.shape[:-1], B.shape[1]))
        else:
            rows.append(float(scales[k]) * F.linear(F.linear(row, A[k].to(x.dtype)), B[k].to(x.dtype)))
    return torch.stack(rows)


def segmented(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scales: Tensor | None,
    index: Tensor | Routed,
    into: Tensor | None = None,
    way: Way | None = None,
) -> Tensor:
    """s_k·B_k·(A_k·x_i) for each row i of x (rows, …, in) and its adapter k = index[i] [docs/math.md (72)].

    A (K, r, in) and B (K, out, r) hold all adapters, those of smaller rank filled up with zeros; scales (K,), or None
    where A holds them; index (rows,) with −1 for none, or the `Routed` made of it. The result (rows, …, out) is added
    to `into`, in place, where that is given. Gradients go to x, A, B and into. Where A and B have the dtype of x and B
    is the transposed view of a (K, r, out), nothing is copied but each row's own factors in the way "rows". The way
    "masked" multiplies by every adapter, so all of them must be finite; "compiled" is taken where it is asked for.

    Raises:
        ValueError: Shapes do not fit, a row asks for an adapter that there is not, or the way is "compiled" where a
            gradient is recorded or no kernel is to be had.
    """
    rows = index if isinstance(index, Routed) else Routed(index, len(A))
    _check(x, A, B, scales, rows, into)
    way, x = way or way_of(x, rows), autocast(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, into)):
        if way == "compiled":
            raise ValueError(
                'the way "compiled" records no gradient; leave the way out, or call it under torch.no_grad()'
            )
        result: Tensor = _Segmented.apply(into, x, A, B, scales, (rows, way))
        return result
    with as_written(x):
        if way != "compiled":
            return Segments(A, B, scales, rows, way, x.dtype).forward(x, into)[0]
        own = compiled_way(A, B, scales, rows, x)
    if own is None:
        raise ValueError(f'the way "compiled" has no kernel for {x.dtype} on {x.device.type} here; leave the way out')
    return own.forward(x, into)[0]


def compiled_way(A: Tensor, B: Tensor, scales: Tensor | None, rows: Routed, x: Tensor) -> OwnRows | None:
    """The way "compiled" for rows like x (rows, …, in), made ready for any number of calls; None without a kernel.

    A (K, r, in), B (K, out, r) and scales (K,) as `segmented` takes them. The kernel has the scales in A.
    """
    A = (A if scales is None else A * scales[:, None, None]).to(x.dtype).contiguous()
    Bt = B.to(x.dtype).transpose(1, 2).contiguous()
    products = own_products(x, A, Bt)
    return None if products is None else OwnRows(A, Bt, rows.index, products)


def _check(x: Tensor, A: Tensor, B: Tensor, scales: Tensor | None, rows: Routed, into: Tensor | None) -> None:
    K, r, width = A.shape
    fits = len(x) == len(rows.index) and x.shape[-1] == width and B.shape[::2] == (K, r)
    fits = fits and (scales is None or scales.shape == (K,))
    if into is not None:
        fits = fits and into.shape == (*x.shape[:-1], B.shape[1])
    if not fits or rows.adapters != K:
        named = {"x": x, "A": A, "B": B, "scales": scales, "into": into}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items() if t is not None)
        raise ValueError(
            f"these do not fit together: {shapes}, and {len(rows.index)} rows routed to {rows.adapters} adapters; "
            f"they are x (rows, …, in), A (K, r, in), B (K, out, r), scales (K,), into (rows, …, out)"
        )


def way_of(x: Tensor, rows: Routed, only_finite: bool = True) -> Way:
    """The way for rows x (rows, …, in), by measurement on widths of 576 and 2048 at rank 16.

    "masked" only where every number of the stacks is finite: half precision can overflow in a row that an adapter
    never meets otherwise, and what is not finite is not blotted out.
    """
    run = len(x) / rows.adapters
    if rows.adapters == 1:
        return "sorted"
    if x.numel() // x.shape[-1] >= LONG_ROW * len(x):
        return "rows"
    if rows.adapters <= FEW_ADAPTERS and only_finite and x.dtype != torch.float16:
        return "sorted" if run >= LONG_RUN else "masked"
    return "sorted" if run >= FULL_RUN else "rows"


def are_few(x: Tensor, rows: Routed) -> bool:
    """Whether the rows x (rows, …, in) are short and few, so that a kernel which takes each by itself is the best."""
    tokens = x.numel() // x.shape[-1]
    return tokens < LONG_ROW * len(x) and tokens <= LONG_RUN * rows.adapters


class _Call(NamedTuple):
    """What the products ask about the rows that they were given."""

    rows: Routed
    adapter: Tensor  # (served,) of each
    scales: Tensor | None  # (served,) fp32


class _Products(NamedTuple):
    """Wide rows are (served, T, in or out), a stack is (K, r, in or out), thin rows are as the way likes them."""

    shrink: Callable[[Tensor, Tensor, _Call], Tensor]  # wide, stack -> thin, scaled
    expand: Callable[[Tensor, Tensor, _Call, Tensor | None], Tensor]  # thin, stack -> wide, added where wide is given
    outer: Callable[[Tensor, Tensor, Tensor, _Call], Tensor]  # thin, wide, stack -> the stack's gradient


class Segments:
    """Forward and backward in one of the ways, made ready for any number of calls in which no gradient is recorded.

    A (K, r, in), B (K, out, r), scales (K,) as `segmented` takes them; dtype is that of the rows.
    """

    def __init__(self, A: Tensor, B: Tensor, scales: Tensor | None, rows: Routed, way: Way, dtype: torch.dtype) -> None:
        self.A, self.Bt = A.to(dtype), B.to(dtype).transpose(1, 2)
        self.do = _WAYS[way]
        self.taken = {"masked": None, "rows": rows.served, "sorted": rows.order}[way]
        adapter = rows.index if self.taken is None else rows.index.index_select(0, self.taken)
        own = None if scales is None else scales.float().index_select(0, adapter.clamp_min(0))
        self.call = _Call(rows, adapter, own)

    def forward(self, x: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result (rows, …, out) for x (rows, …, in), and the thin rows that the backward needs.

        No product may be cast by autocast here (`as_written`).
        """
        h = self.do.shrink(self._take(x), self.A, self.call)
        return self._put(h, self.Bt, x, into), h

    def backward(
        self, x: Tensor | None, h: Tensor | None, dy: Tensor, need_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x (rows, …, in), of A (K, r, in) where x is given, of B (K, out, r) where h is."""
        dx = dA = dB = None
        wide = self._take(dy)
        if need_dx or x is not None:
            dh = self.do.shrink(wide, self.Bt, self.call)
            dx = self._put(dh, self.A, dy, None) if need_dx else None
            dA = None if x is None else self.do.outer(dh, self._take(x), self.A, self.call)
        if h is not None:
            dB = self.do.outer(h, wide, self.Bt, self.call).transpose(1, 2)
        return dx, dA, dB

    def _take(self, x: Tensor) -> Tensor:
        """The rows of x (rows, …, n) that the way multiplies, in its order (served, T, n)."""
        x = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
        return x.contiguous() if self.taken is None else x.index_select(0, self.taken)

    def _put(self, h: Tensor, stack: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
        """What thin rows expand to, (rows, …, n), each where its row was taken from."""
        shape = (*like.shape[:-1], stack.shape[-1])
        flat = (len(like), math.prod(shape[1:-1]), shape[-1])
        if self.taken is None and into is not None and into.is_contiguous():
            self.do.expand(h, stack, self.call, into.view(flat))
            return into
        wide = self.do.expand(h, stack, self.call, None)
        if self.taken is not None:
            whole = wide.new_zeros(flat)
            wide = whole.index_copy_(0, self.taken, wide.view(-1, *flat[1:]))
        if into is None:
            return wide.view(shape)
        into.add_(wide.view(shape))
        return into


def _masked_shrink(wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """(N, in) -> (N, K·r), zero but for each row's own r."""
    h = torch.mm(wide.flatten(0, 1), stack.flatten(0, 1).t())
    own = call.rows.own if call.scales is None else call.rows.own * call.scales[:, None]
    h.view(*wide.shape[:2], *stack.shape[:2]).mul_(own[:, None, :, None])
    return h


def _masked_expand(h: Tensor, stack: Tensor, call: _Call, wide: Tensor | None) -> Tensor:
    flat = stack.flatten(0, 1)
    return torch.mm(h, flat) if wide is None else wide.flatten(0, 1).addmm_(h, flat)


def _masked_outer(h: Tensor, wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    return torch.mm(h.t(), wide.flatten(0, 1)).view(stack.shape)


def _rows_shrink(wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """(rows, T, in) -> (rows, T, r)."""
    return _scaled(torch.bmm(wide, _of_rows(stack, call).transpose(1, 2)), call)


def _rows_expand(h: Tensor, stack: Tensor, call: _Call, wide: Tensor | None) -> Tensor:
    own = _of_rows(stack, call)
    return torch.bmm(h, own) if wide is None else wide.baddbmm_(h, own)


def _scaled(h: Tensor, call: _Call) -> Tensor:
    """(rows, T, r), each row times its adapter's scale."""
    return h if call.scales is None else h.mul_(call.scales[:, None, None])


def _of_rows(stack: Tensor, call: _Call) -> Tensor:
    """The factor of each row (rows, r, in): a copy, but for rows that stand as their adapters do."""
    return stack if call.rows.in_place else stack.index_select(0, call.adapter)


def _rows_outer(h: Tensor, wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """The sum over each adapter's rows, in single precision or wider."""
    grad = torch.zeros(stack.shape, dtype=torch.promote_types(wide.dtype, torch.float32), device=wide.device)
    return grad.index_add_(0, call.adapter, torch.bmm(h.transpose(1, 2), wide).to(grad.dtype))


def _sorted_shrink(wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """(rows, T, in) -> (rows, T, r)."""
    h = wide.new_empty(*wide.shape[:2], stack.shape[1])
    for k, start, end in call.rows.runs:
        torch.mm(wide[start:end].flatten(0, 1), stack[k].t(), out=h[start:end].flatten(0, 1))
    return _scaled(h, call)


def _sorted_expand(h: Tensor, stack: Tensor, call: _Call, wide: Tensor | None) -> Tensor:
    result = h.new_empty(*h.shape[:2], stack.shape[2]) if wide is None else wide
    for k, start, end in call.rows.runs:
        part = result[start:end].flatten(0, 1)
        if wide is None:
            torch.mm(h[start:end].flatten(0, 1), stack[k], out=part)
        else:
            part.addmm_(h[start:end].flatten(0, 1), stack[k])
    return result


def _sorted_outer(h: Tensor, wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    grad = wide.new_zeros(stack.shape)
    for k, start, end in call.rows.runs:
        torch.mm(h[start:end].flatten(0, 1).t(), wide[start:end].flatten(0, 1), out=grad[k])
    return grad


_WAYS = {
    "masked": _Products(_masked_shrink, _masked_expand, _masked_outer),
    "rows": _Products(_rows_shrink, _rows_expand, _rows_outer),
    "sorted": _Products(_sorted_shrink, _sorted_expand, _sorted_outer),
}


class _Segmented(torch.autograd.Function):
    @staticmethod
    def forward(  # `into` comes first: where it is a view, autograd takes the first for what was changed in place
        ctx: Any, into: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scales: Tensor | None, how: tuple[Routed, Way]
    ) -> Tensor:
        if into is not None:
            ctx.mark_dirty(into)
        with as_written(x):
            y, h = Segments(A, B, scales, *how, x.dtype).forward(x, into)
        _, _, of_A, of_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_A else None, h if of_B else None, A, B, scales)
        ctx.how = *how, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, h, A, B, scales = ctx.saved_tensors
        of_into, of_x, *_ = ctx.needs_input_grad
        with as_written(dy):
            dx, dA, dB = Segments(A, B, scales, *ctx.how).backward(x, h, dy, of_x)
        dA, dB = (None if d is None else d.to(of.dtype).contiguous() for d, of in ((dA, A), (dB, B)))
        return dy if of_into else None, dx, dA, dB, None, None
