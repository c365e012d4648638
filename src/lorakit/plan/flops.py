"""Floating-point operations per token, forward and backward, for LoRA and for full fine-tuning beside it.

One multiply-add counts as two. Counted are matrix products and attention; norms, softmax and activations are not:
they cost time, but hardly any operations. This module knows nothing about machines or time.

How long a token of an accelerated training step takes: its products, and what passes beside them.

Products run at nearly the rate of a bare one; norms, activations, rotary positions, the softmax of attention and that
of the loss take a time of their own for each number that they read or write, which does not shrink where products are
fast. This module knows nothing about machines: rate and threads are given.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.architectures.shapes import ModelShape
from lorakit.plan import accelerated, activations
from lorakit.plan.job import Job, Speed
from lorakit.plan.params import Count, read_out
from lorakit.targets.layer_types import EMBEDDING


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of one way to train.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
        recomputed: Of computing the blocks, or parts of them, again in the backward; 0 without.
    """

    forward: float
    backward: float
    recomputed: float

    @property
    def total(self) -> float:
        """FLOPs per token of a training step."""
        return self.forward + self.backward + self.recomputed


def products(shape: ModelShape) -> int:
    """FLOPs per token of one pass through every dense product of the base, the head among them.   [docs/math.md (30)]

    2 × out × in for each Linear and Conv1D, and for each expert that a token passes; looking up an embedding is free.

    Args:
        shape: The model.
    """
    dense = sum(2 * site.weight_parameters for site in shape.sites if site.kind != EMBEDDING)
    return dense + sum(2 * shape.passed(experts) * numbers for experts, numbers in shape.fused)


def attention(shape: ModelShape, length_tokens: int) -> float:
    """FLOPs per token of the products within attention, forward.   [docs/math.md (31)]

    Each query meets T̄ keys and values: 4 × blocks × heads × head_dim × T̄, with T̄ = (T + 1) / 2 in a causal model
    (the mean over positions, which is what sdpa computes) and T otherwise.

    Args:
        shape: The model.
        length_tokens: T, tokens of a row.
    """
    mean_length = (length_tokens + 1) / 2 if shape.causal else float(length_tokens)
    return 4.0 * len(shape.blocks) * shape.query_width * mean_length


def lora(shape: ModelShape, counted: Count, job: Job) -> Flops:
    """FLOPs per token of LoRA training.   [docs/math.md (32)]

    The frozen weights need no gradient, so the backward of a product is one product (dX) and not two; the factors
    add 2r(in + out) forward and twice that backward, of experts for each that a token passes, and so do n rows of a
    head with 2n·in. A matrix that is a bare parameter gets B·A added to it once for a batch, and its gradient is made.
    Slightly high: below the first adapted site there is no dX.

    Args:
        shape: The base.
        counted: The adapter.
        job: Length of rows, checkpointing.
    """
    bare = [site for site in counted.sites if site.is_bare_matrix]
    beside = [(site, shape.passed(site.experts)) for site in counted.sites if not site.is_bare_matrix]
    added = sum(
        2 * through * site.rank * ((0 if site.kind == EMBEDDING else site.in_features) + site.out_features)
        for site, through in beside
    ) + 2 * read_out(shape, counted.rows)
    norms = sum(2 * s.out_features * s.in_features * s.rank for s in counted.sites if s.magnitudes)
    dense = sum(2 * s.out_features * s.in_features * s.rank for s in bare) / job.batch_tokens
    base, within = products(shape), attention(shape, job.length_tokens)
    copied = sum(2 * numbers for numbers in counted.saved.values())  # dW of modules that are trained whole
    copied += sum(2 * site.out_features * site.in_features for site in bare)
    frozen = sum(2 * s.frozen * n / s.experts for s, n in beside)  # the gradient of frozen factors, which is not made
    per_batch = norms / job.batch_tokens  # DoRA's norm of W + ΔW is taken once per forward
    forward = base + within + added + per_batch + dense
    backward = base + 2 * within + 2 * added - frozen + copied + 2 * dense
    again = _again(shape, forward, job)
    again += accelerated.products_again(shape, counted, activations.fused_halves(shape, counted, job), job)
    return Flops(forward, backward, again)


def full(shape: ModelShape, job: Job) -> Flops:
    """FLOPs per token of full fine-tuning: dX and dW, twice the forward.   [docs/math.md (33)]

    Args:
        shape: The model.
        job: Length of rows, checkpointing.
    """
    forward = products(shape) + attention(shape, job.length_tokens)
    return Flops(forward, 2 * forward, _again(shape, forward, job))


def _again(shape: ModelShape, forward: float, job: Job) -> float:
    """What checkpointing computes twice: the blocks, not the head."""
    if not job.gradient_checkpointing:
        return 0.0
    heads = sum(2 * s.weight_parameters for s in shape.sites if s.kind != EMBEDDING and not s.dense)
    return forward - heads


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
