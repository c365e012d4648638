"""Dropout from a seed: whether an element is dropped is a function of seed and position, so only the seed is saved.

Positions are the counters of Philox with seven rounds, four elements per counter; 24 bits of each word decide, so p is
exact to 2⁻²⁴. Fused with a low-rank matmul, the wide operand is read or written once.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 5.1 for the rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, counter, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return which of ROWS × COLUMNS elements are kept; counter (ROWS, COLUMNS / 4) is position / 4 of each fourth
    element.
    """
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=7)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return (tl.reshape(words, (ROWS, COLUMNS)) >> 8).to(tl.int32) >= threshold


@triton.jit
def drop(x, out, seed, count, threshold, scale, BLOCK: tl.constexpr):
    """Write scale·x for `count` elements, zero where the element's 24 random bits are below the threshold."""
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
    """Write h (rows, rank) = dropout(x)·aᵀ for x (rows, columns) and a (rank, columns)."""
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
    """Add dropout(h·a) to y (rows, columns), for h (rows, rank) and a (rank, columns)."""
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
    """Write partial sums (splits, rank, columns) of dhᵀ·dropout(x), for dh (rows, rank) and x (rows, columns)."""
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
