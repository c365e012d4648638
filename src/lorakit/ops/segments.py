"""Batched LoRA with one adapter per row (multi-adapter batches), computed from the stacked factors of all adapters.

With B transposed, forward and backward consist of `shrink` (width to rank), `expand` (rank to width) and `outer` (a
low-rank activation times a wide one). Four methods give the same results:

- `masked` multiplies each row by the factors of all adapters and masks the results: the fastest with few adapters.
- `rows` copies each row's factors and runs one matmul per row: for rows with many tokens, and for many adapters.
- `sorted` groups the rows by adapter, one matmul each: for many short rows, and for a single adapter.
- `compiled` reads each row's factors in place, once, with one kernel for shrink and expand, as BGMV does: for inference
  with short rows and few rows per adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.autograd import (
    Context,
    Replayed,
    alias,
    autocast,
    entered,
    needs_gradient,
    with_replay,
    without_autocast,
)
from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.compiled import CompiledKernels


class PerRowLora:
    """Compute s_k·B_k·(A_k·x_i) for each row i and its adapter k with a compiled kernel. [docs/math.md (72)]
    Shapes: A (K, r, in) with the scales, Bt (K, r, out), index (rows,), −1 for no adapter.
    """

    def __init__(self, A: Tensor, Bt: Tensor, index: Tensor, kernel: CompiledKernels) -> None:
        self.A, self.Bt, self.index, self.kernel = A, Bt, index.long().contiguous(), kernel

    def forward(self, x: Tensor, into: Tensor | None) -> tuple[Tensor, None]:
        """Return the result (rows, …, out) for x (rows, …, in), added to `into` in place if given; nothing is saved."""
        if into is not None and into.dtype == x.dtype and into.is_contiguous():
            room = into
        else:
            room = x.new_zeros(*x.shape[:-1], self.Bt.shape[2])
        if x.numel():
            self.kernel.add_per_row(x.contiguous(), self.A, self.Bt, self.index, room)
        return room if into is None or room is into else into.add_(room), None


Method = Literal["masked", "rows", "sorted", "compiled"]
SHORT_CHUNK = 64  # maximum number of tokens per row for which the compiled method is not slower than per-row matmuls
LONG_ROW = 4  # minimum number of tokens per row for which per-row matmuls are efficient
# Minimum number of rows per adapter for which one matmul per adapter is efficient (LONG_RUN), and for which one matmul
# per adapter is faster than one per row (FULL_RUN).
LONG_RUN, FULL_RUN = 32, 8
# Up to this number of adapters, one matmul with all of them is at least as fast as copying each row's factors.
FEW_ADAPTERS = 16


@dataclass(frozen=True, eq=False)
class Routed:
    """Adapter index of each row, (rows,); −1 means no adapter. Created once per forward pass for all layers.

    Raises:
        ValueError: The index is not an integer tensor or is out of range.
    """

    index: Tensor
    adapters: int

    def __post_init__(self) -> None:
        if self.index.is_floating_point() or self.index.is_complex() or self.index.dtype == torch.bool:
            raise ValueError(f"the adapter index must be an integer tensor; got {self.index.dtype}")
        strange = sorted({k for k in self.index.tolist() if not -1 <= k < self.adapters})
        if strange:
            raise ValueError(
                f"adapter indices {strange} are out of range; they must be 0 to {self.adapters - 1}, or -1 for none"
            )

    @cached_property
    def own(self) -> Tensor:
        """Return an fp32 mask (rows, adapters): 1 for the adapter that a row uses, and 0 for all other adapters."""
        return (self.index[:, None] == torch.arange(self.adapters, device=self.index.device)).float()

    @cached_property
    def in_place(self) -> bool:
        """Return whether the rows that have an adapter are in adapter order, with exactly one row per adapter."""
        return [k for k in self.index.tolist() if k >= 0] == list(range(self.adapters))

    @cached_property
    def served(self) -> Tensor | None:
        """Return the indices (served,) of the rows with an adapter, or None if all rows have one."""
        return None if bool((self.index >= 0).all()) else (self.index >= 0).nonzero().flatten()

    @cached_property
    def order(self) -> Tensor | None:
        """Return the indices (served,) of rows with an adapter by adapter, or None if all rows are in this order."""
        if self.served is None and bool((self.index.diff() >= 0).all()):
            return None
        return self.index.argsort(stable=True)[len(self.index) - int((self.index >= 0).sum()) :]

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Return (adapter, start, end) for each adapter that has rows; its rows are at [start, end) in `order`."""
        runs, end = [], 0
        for k, n in enumerate(torch.bincount(self.index + 1, minlength=self.adapters + 1).tolist()[1:]):
            runs += [(k, end, end + n)] if n else []
            end += n
        return runs


def segmented(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scales: Tensor | None,
    index: Tensor | Routed,
    into: Tensor | None = None,
    method: Method | None = None,
) -> Tensor:
    """Compute s_k·B_k·(A_k·x_i) for each row i of x (rows, …, in) and its adapter k = index[i]. [docs/math.md (72)]

    Gradients flow to x, A, B and `into`. If A and B have the dtype of x, and B is a transposed view of a (K, r, out)
    tensor, the factors are not copied, except by the method "rows".

    Args:
        x: Input rows, (rows, …, in).
        A: The A factors of all adapters, zero-padded to the largest rank, (K, r, in).
        B: The B factors of all adapters, also zero-padded, (K, out, r).
        scales: Scales (K,), or None if A includes the scales.
        index: Adapter of each row, (rows,), with −1 for none; or a `Routed`.
        into: Tensor (rows, …, out) to which the result is added in place, or None.
        method: None chooses one, but never "compiled". "masked" needs finite factors, because it multiplies by all.

    Raises:
        ValueError: Shapes do not match, or an index is out of range; or the method is "compiled", but gradients are
            recorded or no kernel is available.
    """
    rows = index if isinstance(index, Routed) else Routed(index, len(A))
    _check(x, A, B, scales, rows, into)
    method, x = method or method_for(x, rows), autocast(x)
    if needs_gradient(x, A, B, into):
        if method == "compiled":
            raise ValueError(
                'method="compiled" does not record gradients; omit `method`, or disable gradients with torch.no_grad()'
            )
        return _Segmented.apply(into, x, A, B, scales, (rows, method, x.dtype))
    with without_autocast(x):
        if method != "compiled":
            return Segments(A, B, scales, rows, method, x.dtype).forward(x, into)[0]
        own = compiled_method(A, B, scales, rows, x)
    if own is None:
        raise ValueError(f'method="compiled" has no kernel for {x.dtype} on {x.device.type}; omit `method`')
    return own.forward(x, into)[0]


def compiled_method(A: Tensor, B: Tensor, scales: Tensor | None, rows: Routed, x: Tensor) -> PerRowLora | None:
    """Prepare the method "compiled" for rows like x (rows, …, in), or return None if no kernel supports them."""
    A = (A if scales is None else A * scales[:, None, None]).to(x.dtype).contiguous()
    Bt = B.to(x.dtype).transpose(1, 2).contiguous()
    kernels = kernels_for(x, A, Bt, strided=True)
    return None if kernels is None or kernels.own is None else PerRowLora(A, Bt, rows.index, kernels.own)


def _check(x: Tensor, A: Tensor, B: Tensor, scales: Tensor | None, rows: Routed, into: Tensor | None) -> None:
    K, r, width = A.shape
    fits = len(x) == len(rows.index) and x.shape[-1] == width and B.shape[::2] == (K, r)
    fits = fits and (scales is None or scales.shape == (K,))
    fits = fits and (into is None or into.shape == (*x.shape[:-1], B.shape[1]))
    if not fits or rows.adapters != K:
        named = {"x": x, "A": A, "B": B, "scales": scales, "into": into}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items() if t is not None)
        raise ValueError(
            f"shapes do not match: {shapes}, and {len(rows.index)} rows routed to {rows.adapters} adapters; "
            f"expected x (rows, …, in), A (K, r, in), B (K, out, r), scales (K,), into (rows, …, out)"
        )


def method_for(x: Tensor, rows: Routed, only_finite: bool = True) -> Method:
    """Choose the method for rows x (rows, …, in), by thresholds measured at widths 576 and 2048 with rank 16. "masked"
    needs finite factors, because masking does not remove Inf or NaN, and no fp16, where others may overflow.
    """
    run = len(x) / rows.adapters
    if rows.adapters == 1:
        return "sorted"
    if x.numel() // x.shape[-1] >= LONG_ROW * len(x):
        return "rows"
    if rows.adapters <= FEW_ADAPTERS and only_finite and x.dtype != torch.float16:
        return "sorted" if run >= LONG_RUN else "masked"
    return "sorted" if run >= FULL_RUN else "rows"


def is_short_chunk(x: Tensor) -> bool:
    """Return whether the rows x (rows, …, in) are short enough for the method "compiled" in inference."""
    return x.numel() // x.shape[-1] <= SHORT_CHUNK * len(x)


def are_few(x: Tensor, rows: Routed) -> bool:
    """Return whether the rows x (rows, …, in) are short enough, and few enough, for the method "compiled"."""
    tokens = x.numel() // x.shape[-1]
    return tokens < LONG_ROW * len(x) and tokens <= LONG_RUN * rows.adapters


class _Call(NamedTuple):
    """Adapters and scales of the rows that the matmuls process."""

    rows: Routed
    adapter: Tensor  # adapter of each row, (served,)
    scales: Tensor | None  # (served,) fp32


class _Products(NamedTuple):
    """The matmuls of a method on wide rows (served, T, in or out) and stacks (K, r, in or out)."""

    shrink: Callable[[Tensor, Tensor, _Call], Tensor]  # wide rows, stack -> low-rank activation, scaled
    expand: Callable[[Tensor, Tensor, _Call, Tensor | None], Tensor]  # activation, stack, rows to add to -> wide rows
    outer: Callable[[Tensor, Tensor, Tensor, _Call], Tensor]  # activation, wide rows, stack -> gradient of the stack


class Segments:
    """Forward and backward computations of one method, for factors as in `segmented` and rows of the given dtype. An
    instance can be used repeatedly, but only while gradients are not recorded.
    """

    def __init__(
        self, A: Tensor, B: Tensor, scales: Tensor | None, rows: Routed, method: Method, dtype: torch.dtype
    ) -> None:
        self.A, self.Bt = A.to(dtype), B.to(dtype).transpose(1, 2)
        self.do = _METHODS[method]
        self.taken = {"masked": None, "rows": rows.served, "sorted": rows.order}[method]
        adapter = rows.index if self.taken is None else rows.index.index_select(0, self.taken)
        own = None if scales is None else scales.float().index_select(0, adapter.clamp_min(0))
        self.call = _Call(rows, adapter, own)

    def forward(self, x: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the result (rows, …, out) for x (rows, …, in), and the low-rank activation; without autocast."""
        h = self.do.shrink(self._take(x), self.A, self.call)
        return self._put(h, self.Bt, x, into), h

    def backward(
        self, x: Tensor | None, h: Tensor | None, dy: Tensor, need_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x (rows, …, in) if `need_dx`, A (K, r, in) if x is given, B (K, out, r) if h is."""
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
        """Return the rows of x (rows, …, n) that the method needs, in the required order, as (served, T, n)."""
        x = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
        return x.contiguous() if self.taken is None else x.index_select(0, self.taken)

    def _put(self, h: Tensor, stack: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
        """Expand a low-rank activation to (rows, …, n), with the rows in their original positions."""
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
        return into  # not the result of `add_`, so that torch.compile sees that the input itself is returned


def _masked_shrink(wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """Shrink `wide` (rows, T, in) to (rows·T, K·r), and zero all columns except the r columns of each row's adapter."""
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
    """Shrink `wide` (rows, T, in) to (rows, T, r)."""
    return _scaled(torch.bmm(wide, _of_rows(stack, call).transpose(1, 2)), call)


def _rows_expand(h: Tensor, stack: Tensor, call: _Call, wide: Tensor | None) -> Tensor:
    own = _of_rows(stack, call)
    return torch.bmm(h, own) if wide is None else wide.baddbmm_(h, own)


def _scaled(h: Tensor, call: _Call) -> Tensor:
    """Multiply h (rows, T, r) by the scale of each row's adapter."""
    return h if call.scales is None else h.mul_(call.scales[:, None, None])


def _of_rows(stack: Tensor, call: _Call) -> Tensor:
    """Return each row's factor (rows, r, in). This makes a copy unless `Routed.in_place` is true."""
    return stack if call.rows.in_place else stack.index_select(0, call.adapter)


def _rows_outer(h: Tensor, wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """Sum the per-row products for each adapter, in fp32 or wider."""
    grad = torch.zeros(stack.shape, dtype=torch.promote_types(wide.dtype, torch.float32), device=wide.device)
    return grad.index_add_(0, call.adapter, torch.bmm(h.transpose(1, 2), wide).to(grad.dtype))


def _sorted_shrink(wide: Tensor, stack: Tensor, call: _Call) -> Tensor:
    """Shrink `wide` (rows, T, in) to (rows, T, r)."""
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


_METHODS = {
    "masked": _Products(_masked_shrink, _masked_expand, _masked_outer),
    "rows": _Products(_rows_shrink, _rows_expand, _rows_outer),
    "sorted": _Products(_sorted_shrink, _sorted_expand, _sorted_outer),
}


_State = tuple[Routed, Method, torch.dtype]
"""The routed rows, the method, and the dtype of the rows."""

_Saved = tuple[_State, torch.Size]
"""The arguments of `Segments` after the scales, and the shape of x."""


def _replay(ctx: Context[_Saved], saved: Sequence[Tensor]) -> Replayed:
    (x, _, A, B, scales), ((rows, _, dtype), shape) = saved, ctx.state
    x, A, B = entered(x, None, shape, (dtype, A.device)), alias(A), alias(B)
    into = x.new_zeros(*shape[:-1], B.shape[1], requires_grad=True)
    return (into, x, A, B, None, None), (into + reference.segments(x, A, B, scales, rows.index),)


class _Segmented(torch.autograd.Function):
    """Autograd function for `segmented`; `into` comes first, as autograd expects of a view that is modified."""

    @staticmethod
    def forward(
        ctx: Context[_Saved], into: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scales: Tensor | None, how: _State
    ) -> Tensor:
        if into is not None:
            ctx.mark_dirty(into)
        with without_autocast(x):
            y, h = Segments(A, B, scales, *how).forward(x, into)
        _, _, of_A, of_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_A or of_B else None, h if of_B else None, A, B, scales)
        ctx.state = how, x.shape
        return y

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_Saved], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, scales = ctx.saved_tensors
        of_into, of_x, of_A, *_ = ctx.needs_input_grad
        with without_autocast(dy):
            dx, dA, dB = Segments(A, B, scales, *ctx.state[0]).backward(x if of_A else None, h, dy, of_x)
        dA, dB = (None if d is None else d.to(of.dtype).contiguous() for d, of in ((dA, A), (dB, B)))
        return dy if of_into else None, dx, dA, dB, None, None
