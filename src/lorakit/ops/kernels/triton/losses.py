"""Cross-entropy of rows of logits, which become the gradient in place, [docs/math.md (75)]: two passes over a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy(
    z, labels, losses, vocabulary, scale, cap,
    CAPPED: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss (rows,) of each row of z (rows, V) at its label, and in the place of z the gradient over scale."""
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
    own = _logits(z + label, label >= 0, scale, cap, CAPPED)
    tl.store(losses + row, tl.log(total) + (most - own))
    if GRADIENTS:
        tl.debug_barrier()  # the label's logit is read before anything is written
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
