"""Dropout from a seed: whether a number is dropped is a function of seed and place, so nothing is kept but the seed.

The counters of Philox are the places, four to one; 24 bits of each word decide, so a probability is exact to 2⁻²⁴.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 2.2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def drop(x, out, seed, count, threshold, scale, QUARTER: tl.constexpr):
    """Write scale·x of so many numbers, zero where the 24 bits of a number's own word are below the threshold."""
    block, lane = tl.program_id(0).to(tl.int64), tl.arange(0, QUARTER)
    counter = block * QUARTER + lane
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    words = tl.philox(tl.load(seed), low, high, zero, zero)
    for quarter in tl.static_range(4):
        at = block * (4 * QUARTER) + quarter * QUARTER + lane
        inside = at < count
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        kept = (words[quarter] >> 8).to(tl.int32) >= threshold
        tl.store(out + at, tl.where(kept, v * scale, 0.0), mask=inside)
