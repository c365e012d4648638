"""How long a token of an accelerated training step takes: its products, and what passes beside them.

Products run at nearly the rate of a bare one; norms, activations, rotary positions, the softmax of attention and that
of the loss take a time of their own for each number that they read or write, which does not shrink where products are
fast. This module knows nothing about machines: rate and threads are given.
"""

from __future__ import annotations

from lorakit.plan.flops import Flops
from lorakit.plan.job import Job, Speed
from lorakit.plan.shapes import ModelShape

OF_BARE_PRODUCTS = 0.88
"""Share of the calibrated rate that products of a whole step reach: "products alone" of `benchmarks/bench_step.py`."""

SECONDS_PER_NUMBER = 0.9e-9
"""Of one thread, for one number that is read or written beside the products, Python and allocation among it.

From the row "lorakit" of `benchmarks/bench_step.py` (SmolLM2-135M, bf16, 4 × 256 tokens, 2 threads of a CPU without
matrix units, dropout 0.05) less the products.
"""

LOGITS = 6
"""Times that a number of the logits is read or written: by the product, on the way to fp32 and back, by softmax."""


def numbers(shape: ModelShape, job: Job) -> float:
    """Numbers a token that an accelerated step reads or writes beside its products.   [docs/math.md (37)]

    Slightly high for a model without rotary positions, and where not every token is trained.

    Args:
        shape: The model.
        job: Length of rows, checkpointing.
    """
    seen = (job.length_tokens + 1) / 2 if shape.causal else float(job.length_tokens)
    widths = (shape.hidden, shape.inner_width, shape.query_width + shape.kv_width, shape.heads * seen)
    forward = _total(widths, (10, 3 if shape.gated else 2, 2, 2))
    backward = _total(widths, (14, 8 if shape.gated else 5, 2, 5))
    again = forward if job.gradient_checkpointing else 0.0
    return len(shape.blocks) * (forward + backward + again) + LOGITS * shape.vocab


def token_seconds(shape: ModelShape, costs: Flops, job: Job, speed: Speed) -> float | None:
    """Seconds a token of an accelerated step, or None where the speed does not say enough.   [docs/math.md (37)]

    Args:
        shape: The model.
        costs: FLOPs per token.
        job: Length of rows, checkpointing.
        speed: Of the machine; its rate of products and its threads are read.
    """
    if speed.flops_per_second is None or speed.threads is None or speed.tokens_per_second is not None:
        return None
    products = costs.total / (speed.flops_per_second * OF_BARE_PRODUCTS)
    return products + numbers(shape, job) * SECONDS_PER_NUMBER / speed.threads


def _total(widths: tuple[float, ...], times: tuple[int, ...]) -> float:
    """Numbers of the stream, inside the feed-forward, of q and k, and of the scores, each so many times."""
    return sum(width * count for width, count in zip(widths, times, strict=True))
