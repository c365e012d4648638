"""Softmax of attention's scores and back, [docs/math.md (81)] and (82): a row for each program, in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax(scores, low, high, kinds, m, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, WIDTH: tl.constexpr):
    """Row i of scores (rows, m) sees the places low[i % kinds] up to high[i % kinds] alone; the others become 0."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    kind = row % kinds
    seen = column < m
    if HAS_LOW:
        seen = seen & (column >= tl.load(low + kind))
    if HAS_HIGH:
        seen = seen & (column < tl.load(high + kind))
    at = scores + row * m + column
    t = tl.load(at, mask=seen, other=-float("inf")).to(tl.float32)
    e = tl.exp(t - tl.max(t, 0))
    tl.store(at, e / tl.sum(e, 0), mask=column < m)


@triton.jit
def softmax_backward(weights, ds, m, WIDTH: tl.constexpr):
    """The gradient of the scores of a row (m,) in the place of that of its weights."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, at = column < m, row * m + column
    w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(ds + at, w * (d - tl.sum(w * d, 0)), mask=inside)
