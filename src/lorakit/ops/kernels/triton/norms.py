"""RMS norm of rows, [docs/math.md (76)]: a tile of whole rows for each program, everything in fp32 between."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms(
    x, w, n, rstd, count, d, eps, offset,
    HAS_W: tl.constexpr, FROM_ZERO: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The norm n (count, d) of x (count, d), and rstd (count, 1), which is read instead where AGAIN."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside, at = (row < count) & (column < d), row * d + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if AGAIN:
        r = tl.load(rstd + row, mask=row < count, other=0.0)
    else:
        r = tl.rsqrt(tl.sum(v * v, 1)[:, None] / d + eps)
        tl.store(rstd + row, r, mask=row < count)
    v = v * r
    if HAS_W:
        gain = tl.load(w + column, mask=column < d, other=0.0).to(tl.float32)
        if FROM_ZERO:
            v = v * (gain + offset)
        else:
            v = v.to(n.dtype.element_ty).to(tl.float32) * gain
    tl.store(n + at, v, mask=inside)


@triton.jit
def rms_backward(
    dn, x, w, rstd, add, dx, count, d, offset,
    HAS_W: tl.constexpr, HAS_ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient dx (count, d), which may be dn, from dn, x and `add` (count, d), and rstd (count, 1)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside, at = (row < count) & (column < d), row * d + column
    e = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row, mask=row < count, other=0.0)
    if HAS_W:
        e = e * (tl.load(w + column, mask=column < d, other=0.0).to(tl.float32) + offset)
    share = tl.sum(e * v, 1)[:, None] / d
    gradient = r * e - r * r * r * share * v
    if HAS_ADD:
        gradient = gradient + tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, gradient, mask=inside)
