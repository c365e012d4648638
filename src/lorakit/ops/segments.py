"""Batched LoRA with one adapter per row (multi-adapter batches), computed from the stacked factors of all adapters.

With B transposed, a row is computed by `shrink` (width to rank) and `expand` (rank to width), without autograd. Four
methods give the same results:

- `masked` multiplies each row by the factors of all adapters and masks the results: the fastest with few adapters.
- `rows` copies each row's factors and runs one matmul per row: for rows with many tokens, and for many adapters.
- `sorted` groups the rows by adapter, one matmul each: for many short rows, and for a single adapter.
- `compiled` reads each row's factors in place, once, with one kernel for shrink and expand, as BGMV does: with short
  rows and few rows per adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.compiled import CompiledKernels

Method = Literal["masked", "rows", "sorted"]
LONG_ROW = 4  # minimum number of tokens per row for which per-row matmuls are efficient
# Minimum number of rows per adapter for which one matmul per adapter is efficient (LONG_RUN), and for which one matmul
# per adapter is faster than one per row (FULL_RUN).
LONG_RUN, FULL_RUN = 32, 8
# Up to this number of adapters, one matmul with all of them is at least as fast as copying each row's factors.
FEW_ADAPTERS = 16


@dataclass(frozen=True, eq=False)
class Routed:
    """Adapter index of each row, (rows,) int64; −1 means no adapter. Created once per forward pass for all layers."""

    index: Tensor
    adapters: int

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


class PerRowLora:
    """Compute B_k·(A_k·x_i) for each row i and its adapter k with a compiled kernel. [docs/math.md (72)]
    Shapes: A (K, r, in) with the scales, Bt (K, r, out), index (rows,), −1 for no adapter.
    """

    def __init__(self, A: Tensor, Bt: Tensor, index: Tensor, kernel: CompiledKernels) -> None:
        self.A, self.Bt, self.index, self.kernel = A, Bt, index, kernel

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the result for x (rows, …, in) to y (rows, …, out)."""
        if x.numel():
            self.kernel.add_per_row(x.contiguous(), self.A, self.Bt, self.index, y)


def compiled_method(A: Tensor, B: Tensor, rows: Routed, x: Tensor) -> PerRowLora | None:
    """Return the method "compiled" for factors as in `Segments` and rows like x (rows, …, in), if a kernel has it."""
    Bt = B.transpose(1, 2)
    kernels = kernels_for(x, A, Bt, strided=True)
    return None if kernels is None or kernels.own is None else PerRowLora(A, Bt, rows.index, kernels.own)


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


def are_few(x: Tensor, rows: Routed) -> bool:
    """Return whether the rows x (rows, …, in) are short enough, and few enough, for the method "compiled"."""
    tokens = x.numel() // x.shape[-1]
    return tokens < LONG_ROW * len(x) and tokens <= LONG_RUN * rows.adapters


class Segments:
    """B_k·(A_k·x_i) for each row i and its adapter k by one method, which can be used repeatedly. [docs/math.md (72)]
    Shapes: A (K, r, in) with the scales, and B (K, out, r), a transposed view of (K, r, out), both zero-padded to r.
    """

    def __init__(self, A: Tensor, B: Tensor, rows: Routed, method: Method) -> None:
        self.A, self.Bt, self.rows = A, B.transpose(1, 2), rows
        self.shrink, self.expand = _METHODS[method]
        self.taken = {"masked": None, "rows": rows.served, "sorted": rows.order}[method]
        self.adapter = rows.index if self.taken is None else rows.index.index_select(0, self.taken)  # (served,)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the result for x (rows, …, in) to y (rows, …, out), which is contiguous and has the dtype of x."""
        tokens = math.prod(x.shape[1:-1])
        wide, flat = x.reshape(len(x), tokens, x.shape[-1]), y.view(len(y), tokens, y.shape[-1])
        if self.taken is None:
            self.expand(self.shrink(wide.contiguous(), self.A, self), self.Bt, self, flat)
            return
        h = self.shrink(wide.index_select(0, self.taken), self.A, self)
        added = self.expand(h, self.Bt, self, None)
        flat.add_(torch.zeros_like(flat).index_copy_(0, self.taken, added))


class _Matmuls(NamedTuple):
    """The matmuls of a method on wide rows (served, T, in or out) and stacks (K, r, in or out)."""

    shrink: Callable[[Tensor, Tensor, Segments], Tensor]  # wide rows, stack -> low-rank activation
    expand: Callable[[Tensor, Tensor, Segments, Tensor | None], Tensor]  # activation, stack, rows to add to


def _masked_shrink(wide: Tensor, stack: Tensor, call: Segments) -> Tensor:
    """Shrink `wide` (rows, T, in) to (rows·T, K·r), and zero all columns except the r columns of each row's adapter."""
    h = torch.mm(wide.flatten(0, 1), stack.flatten(0, 1).t())
    h.view(*wide.shape[:2], *stack.shape[:2]).mul_(call.rows.own[:, None, :, None])
    return h


def _masked_expand(h: Tensor, stack: Tensor, call: Segments, wide: Tensor | None) -> Tensor:
    assert wide is not None  # this method takes all rows
    return wide.flatten(0, 1).addmm_(h, stack.flatten(0, 1))


def _rows_shrink(wide: Tensor, stack: Tensor, call: Segments) -> Tensor:
    """Shrink `wide` (rows, T, in) to (rows, T, r)."""
    return torch.bmm(wide, _of_rows(stack, call).transpose(1, 2))


def _rows_expand(h: Tensor, stack: Tensor, call: Segments, wide: Tensor | None) -> Tensor:
    factors = _of_rows(stack, call)
    return torch.bmm(h, factors) if wide is None else wide.baddbmm_(h, factors)


def _of_rows(stack: Tensor, call: Segments) -> Tensor:
    """Return each row's factor (rows, r, in). This makes a copy unless `Routed.in_place` is true."""
    return stack if call.rows.in_place else stack.index_select(0, call.adapter)


def _sorted_shrink(wide: Tensor, stack: Tensor, call: Segments) -> Tensor:
    """Shrink `wide` (rows, T, in) to (rows, T, r)."""
    h = wide.new_empty(*wide.shape[:2], stack.shape[1])
    for k, start, end in call.rows.runs:
        torch.mm(wide[start:end].flatten(0, 1), stack[k].t(), out=h[start:end].flatten(0, 1))
    return h


def _sorted_expand(h: Tensor, stack: Tensor, call: Segments, wide: Tensor | None) -> Tensor:
    result = h.new_empty(*h.shape[:2], stack.shape[2]) if wide is None else wide
    for k, start, end in call.rows.runs:
        part = result[start:end].flatten(0, 1)
        if wide is None:
            torch.mm(h[start:end].flatten(0, 1), stack[k], out=part)
        else:
            part.addmm_(h[start:end].flatten(0, 1), stack[k])
    return result


_METHODS = {
    "masked": _Matmuls(_masked_shrink, _masked_expand),
    "rows": _Matmuls(_rows_shrink, _rows_expand),
    "sorted": _Matmuls(_sorted_shrink, _sorted_expand),
}
