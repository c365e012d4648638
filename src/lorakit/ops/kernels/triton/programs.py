"""Triton programs: elementwise and row-wise kernels, and dropout from a seed.

- Activations and their gradients are computed in one pass and rounded once. [docs/math.md (78), (79)]
- Cross-entropy takes two passes over a row of logits, and overwrites the row with its gradient. [docs/math.md (75)]
- RMS norm processes several whole rows per program, with intermediate results in fp32. [docs/math.md (76)]
- Each rotary program processes several heads of one token, reading them before overwriting them. [docs/math.md (80)]
- Each softmax program computes one row of attention scores, or its gradient, in place. [docs/math.md (81), (82)]

Dropout depends only on the seed and an element's position: random bits come from Philox with seven rounds, whose
counter is the position divided by 4, because each call yields four integers. The upper 24 bits of an element's integer
decide, so p is accurate to 2⁻²⁴. Fused with a low-rank matmul, it reads or writes the wide operand only once.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; for the number of rounds, see section 5.1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def value(x, ACT: tl.constexpr):
    """Return f(x) for fp32 x, where f is the activation named ACT."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(ACT == "relu", "no kernel for this activation")
        y = tl.where(x <= 0.0, 0.0, x)  # keeps NaN
    return y


@triton.jit
def slope(x, ACT: tl.constexpr):
    """Return f'(x) for fp32 x, where f is the activation named ACT."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        y = s + x * (s * (1.0 - s)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    else:
        tl.static_assert(ACT == "relu", "no kernel for this activation")
        y = tl.where(x <= 0.0, 0.0, 1.0)
    return y


@triton.jit
def gate(first, up, out, count, ACT: tl.constexpr, HAS_UP: tl.constexpr, BLOCK: tl.constexpr):
    """Write f(first)·up, or f(first) if HAS_UP is false, to `out`, for `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = value(tl.load(first + at, mask=inside, other=0.0).to(tl.float32), ACT)
    if HAS_UP:
        y = y * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=inside)


@triton.jit
def gate_backward(da, first, up, dfirst, dup, count, ACT: tl.constexpr, HAS_UP: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradients of `gate` to dfirst, which may be da, that of the output, and, if HAS_UP, to dup."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(da + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_UP:
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dup + at, g * value(x, ACT), mask=inside)
        g = g * u
    tl.store(dfirst + at, g * slope(x, ACT), mask=inside)


@triton.jit
def cross_entropy(
    z, labels, losses, vocabulary, scale, cap,
    CAPPED: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the losses (rows,) for logits z (rows, V); if GRADIENTS, replace z with its gradient divided by `scale`."""
    row = tl.program_id(0).to(tl.int64)
    z += row * vocabulary
    label = tl.load(labels + row)
    most, total = -float("inf"), 0.0
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        t = _logits(z + column, column < vocabulary, scale, cap, CAPPED)
        above = tl.maximum(most, tl.max(t, 0))
        total = total * tl.exp(most - above) + tl.sum(tl.exp(t - above), 0)
        most = above
    at_label = _logits(z + label, label >= 0, scale, cap, CAPPED)
    tl.store(losses + row, tl.log(total) + (most - at_label))
    if GRADIENTS:
        tl.debug_barrier()  # the label's logit must be read before any logit is overwritten
        for begin in range(0, vocabulary, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < vocabulary
            t = _logits(z + column, inside, scale, cap, CAPPED)
            p = tl.exp(t - most) / total - tl.where(column == label, 1.0, 0.0)
            if CAPPED:
                bounded = tl.where(inside, t, 0.0) / cap
                p = p * (1.0 - bounded * bounded)
            tl.store(z + column, p, mask=inside)


@triton.jit
def _logits(pointer, inside, scale, cap, CAPPED: tl.constexpr):
    t = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) * scale
    if CAPPED:
        t = cap * (2.0 * tl.sigmoid(2.0 * (t / cap)) - 1.0)
    return tl.where(inside, t, -float("inf"))


@triton.jit
def rms(
    x, w, n, rstd, count, d, eps, offset,
    FROM_ZERO: tl.constexpr, RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the RMS norm of x (count, d) to n, and 1/RMS of each row to rstd (count, 1), or read it if RECOMPUTE."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside, at = (row < count) & (column < d), row * d + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RECOMPUTE:
        r = tl.load(rstd + row, mask=row < count, other=0.0)
    else:
        r = tl.rsqrt(tl.sum(v * v, 1)[:, None] / d + eps)
        tl.store(rstd + row, r, mask=row < count)
    v = v * r
    gain = tl.load(w + column, mask=column < d, other=0.0).to(tl.float32)
    if FROM_ZERO:
        v = v * (gain + offset)
    else:
        v = v.to(n.dtype.element_ty).to(tl.float32) * gain
    tl.store(n + at, v, mask=inside)


@triton.jit
def rms_backward(
    dn, x, w, rstd, add, dx, count, d, offset,
    HAS_ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, plus `add` if HAS_ADD, to dx, which may be dn; all are (count, d)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside, at = (row < count) & (column < d), row * d + column
    e = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row, mask=row < count, other=0.0)
    e = e * (tl.load(w + column, mask=column < d, other=0.0).to(tl.float32) + offset)
    share = tl.sum(e * v, 1)[:, None] / d
    gradient = r * e - r * r * r * share * v
    if HAS_ADD:
        gradient = gradient + tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, gradient, mask=inside)


@triton.jit
def rotate(
    x, cos, sin, out, stride, stride_out, tokens, heads, width, rot,
    BACK: tl.constexpr, PER_ROW: tl.constexpr, IN_PLACE: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate x (B, T, H, D), back if BACK, to `out`; cos and sin are (B or 1, T, rot), the former if PER_ROW."""
    target = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    half = rot // 2
    inside, known = (head < heads) & (pair < half), pair < half
    one, other = pair, pair + half
    table = (target if PER_ROW else target % tokens) * rot
    c1, c2 = _narrowed(cos + table + one, known, x), _narrowed(cos + table + other, known, x)
    s1, s2 = _narrowed(sin + table + one, known, x), _narrowed(sin + table + other, known, x)
    x += target * stride + head * width
    out += target * stride_out + head * width
    x1 = tl.load(x + one, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + other, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    tl.store(out + one, y1, mask=inside)
    tl.store(out + other, y2, mask=inside)
    if not IN_PLACE:
        column = rot + tl.arange(0, REST)[None, :]
        passing = (head < heads) & (column < width)
        tl.store(out + column, tl.load(x + column, mask=passing, other=0.0), mask=passing)


@triton.jit
def _narrowed(pointer, mask, like):
    """Load values from a cos or sin table and round them to the dtype of the heads."""
    return tl.load(pointer, mask=mask, other=0.0).to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def softmax(scores, low, high, kinds, m, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the softmax of scores (rows, m) in place, 0 outside low[i % kinds] to high[i % kinds] − 1 in row i."""
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
    """Replace ds, the gradient of a row's softmax weights (m,), with the gradient of the row's scores."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, at = column < m, row * m + column
    w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(ds + at, w * (d - tl.sum(w * d, 0)), mask=inside)


@triton.jit
def kept(seed, counter, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a mask (ROWS, COLUMNS) of what dropout keeps; `counter` (ROWS, COLUMNS / 4) has positions / 4."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=7)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return (tl.reshape(words, (ROWS, COLUMNS)) >> 8).to(tl.int32) >= threshold


@triton.jit
def drop(x, out, seed, count, threshold, scale, BLOCK: tl.constexpr):
    """Write scale·x to `out` for `count` elements, or 0 for elements whose 24 random bits are below the threshold."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    stays = kept(tl.load(seed), (begin // 4 + tl.arange(0, BLOCK // 4))[None, :], threshold, 1, BLOCK)
    at = (begin + tl.arange(0, BLOCK))[None, :]
    v = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, tl.where(stays, v * scale, 0.0), mask=at < count)


@triton.jit
def shrink(
    x, a, h, seed, rows, columns, rank, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Write dropout(x)·aᵀ to h (rows, rank), for x (rows, columns) and `a` (rank, columns)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    thin, key = tl.arange(0, RANK)[None, :], tl.load(seed)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for begin in range(0, columns, COLUMNS):
        column, down = (begin + tl.arange(0, COLUMNS))[None, :], (begin + tl.arange(0, COLUMNS))[:, None]
        counter = (row * columns + begin) // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        v = tl.load(x + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
        v = tl.where(kept(key, counter, threshold, ROWS, COLUMNS), v, 0.0).to(x.dtype.element_ty)
        factor = tl.load(a + thin * columns + down, mask=(thin < rank) & (down < columns), other=0.0)
        total = tl.dot(v, factor, total, input_precision="ieee")
    tl.store(h + row * rank + thin, total, mask=(row < rows) & (thin < rank))


@triton.jit
def add_low_rank(
    h, a, y, seed, rows, columns, rank, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Add dropout(h·a) to y (rows, columns), for h (rows, rank) and `a` (rank, columns)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    begin = tl.program_id(1) * COLUMNS
    column, across, down = (
        (begin + tl.arange(0, COLUMNS))[None, :],
        tl.arange(0, RANK)[None, :],
        tl.arange(0, RANK)[:, None],
    )
    left = tl.load(h + row * rank + across, mask=(row < rows) & (across < rank), other=0.0)
    right = tl.load(a + down * columns + column, mask=(down < rank) & (column < columns), other=0.0)
    counter = (row * columns + begin) // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    stays = kept(tl.load(seed), counter, threshold, ROWS, COLUMNS)
    product = tl.where(stays, tl.dot(left, right, input_precision="ieee"), 0.0)
    at, inside = row * columns + column, (row < rows) & (column < columns)
    tl.store(y + at, tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + product, mask=inside)


@triton.jit
def outer(
    dh, x, parts, seed, rows, columns, rank, threshold, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Write partial sums of dhᵀ·dropout(x), (rows, rank) and (rows, columns), to `parts` (splits, rank, columns)."""
    begin, part = tl.program_id(0) * COLUMNS, tl.program_id(1).to(tl.int64)
    column, thin, key = (begin + tl.arange(0, COLUMNS))[None, :], tl.arange(0, RANK)[:, None], tl.load(seed)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(0, share, ROWS):
        row, across = (
            (part * share + first + tl.arange(0, ROWS))[:, None],
            (part * share + first + tl.arange(0, ROWS))[None, :],
        )
        counter = (row * columns + begin) // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        v = tl.load(x + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
        v = tl.where(kept(key, counter, threshold, ROWS, COLUMNS), v, 0.0).to(x.dtype.element_ty)
        left = tl.load(dh + across * rank + thin, mask=(across < rows) & (thin < rank), other=0.0)
        total = tl.dot(left, v, total, input_precision="ieee")
    tl.store(parts + (part * rank + thin) * columns + column, total, mask=(thin < rank) & (column < columns))
