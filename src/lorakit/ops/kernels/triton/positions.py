"""Rotary positions, [docs/math.md (80)]: a token's heads for each program, read before they are written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(
    x, cos, sin, out, stride, stride_out, tokens, heads, width, rot,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, PER_ROW: tl.constexpr, IN_PLACE: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turn x (B, T, H, D), or turn it back, into out; cos and sin (B, T, rot) where PER_ROW, else (1, T, rot)."""
    place = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    half = rot // 2
    inside, known = (head < heads) & (pair < half), pair < half
    if INTERLEAVED:
        one, other = 2 * pair, 2 * pair + 1
    else:
        one, other = pair, pair + half
    table = (place if PER_ROW else place % tokens) * rot
    c1, c2 = _narrowed(cos + table + one, known, x), _narrowed(cos + table + other, known, x)
    s1, s2 = _narrowed(sin + table + one, known, x), _narrowed(sin + table + other, known, x)
    x += place * stride + head * width
    out += place * stride_out + head * width
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
    """Numbers of a table, rounded as the dtype of the heads rounds them."""
    return tl.load(pointer, mask=mask, other=0.0).to(like.dtype.element_ty).to(tl.float32)
