"""FLOPs and time per token, forward and backward, for LoRA and for full fine-tuning.

One multiply-add counts as two FLOPs. Matmuls and attention are counted; norms, softmax and activations are not. In an
accelerated step, matmuls run at nearly the measured matmul rate, and everything else takes a fixed time per element
read or written, no matter how fast the matmuls are.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.architectures.shapes import ModelShape
from lorakit.choices import EMBEDDING
from lorakit.plan import accelerated, activations
from lorakit.plan.job import Job, Speed
from lorakit.plan.packed import int8_flops
from lorakit.plan.params import Count, read_out


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of one training method.

    Attributes:
        backward: FLOPs of the backward pass, without recomputation.
        recomputed: FLOPs of recomputing blocks, or parts of blocks, in the backward pass.
        int8: FLOPs, included in the others, of matmuls in int8.
    """

    forward: float
    backward: float
    recomputed: float
    int8: float = 0.0

    @property
    def total(self) -> float:
        """Return the FLOPs per token of a training step."""
        return self.forward + self.backward + self.recomputed

    def at_dtype_rate(self, speed: Speed) -> float:
        """Return the FLOPs per token that take as long at the matmul rate of the dtype. [docs/math.md (109)]"""
        if not self.int8 or speed.int8_flops_per_second is None or speed.flops_per_second is None:
            return self.total
        return self.total - self.int8 * (1 - speed.flops_per_second / speed.int8_flops_per_second)


def matmuls(shape: ModelShape) -> int:
    """Return the FLOPs per token of the base's dense matmuls in a forward pass, including the head. [docs/math.md (30)]

    Each Linear and Conv1D, and each expert that a token passes through, adds 2 × out × in; an embedding lookup is free.
    """
    dense = sum(2 * site.weight_parameters for site in shape.sites if site.kind != EMBEDDING)
    return dense + sum(2 * shape.passed(experts) * elements for experts, elements in shape.fused)


def attention(shape: ModelShape, length_tokens: int) -> float:
    """Return the FLOPs per token of the attention matmuls in a forward pass. [docs/math.md (31)]

    Each query attends to T̄ keys and values: 4 × blocks × heads × head_dim × T̄, with T̄ = (T + 1) / 2 in a causal
    model (the mean over positions, because sdpa skips masked keys) and T̄ = T otherwise.
    """
    mean_length = (length_tokens + 1) / 2 if shape.causal else float(length_tokens)
    return 4.0 * len(shape.blocks) * shape.query_width * mean_length


def lora(shape: ModelShape, counted: Count, job: Job) -> Flops:
    """Return the FLOPs per token of LoRA training. [docs/math.md (32)]

    Frozen weights need no gradient, so the backward pass of a matmul consists of one matmul (dX), not two. The factors
    add 2r(in + out) FLOPs in the forward pass and twice that in the backward pass, for each expert that a token passes
    through. Each trainable token row of a head adds 2·in FLOPs in the forward pass and twice that in the backward pass.
    For a single matrix in `target_parameters`, B·A is added once per batch, and the gradient of the whole matrix is
    computed. The result is slightly too high: it includes dX below the first adapted site, where dX is not computed.
    """
    bare = [site for site in counted.sites if site.is_bare_matrix]
    parallel = [(site, shape.passed(site.experts)) for site in counted.sites if not site.is_bare_matrix]
    added = sum(
        2 * through * site.rank * ((0 if site.kind == EMBEDDING else site.in_features) + site.out_features)
        for site, through in parallel
    ) + 2 * read_out(shape, counted.rows)
    norms = sum(2 * s.out_features * s.in_features * s.rank for s in counted.sites if s.magnitudes)
    dense = sum(2 * s.out_features * s.in_features * s.rank for s in bare) / job.batch_tokens
    base, within = matmuls(shape), attention(shape, job.length_tokens)
    copied = sum(2 * count for count in counted.saved.values())  # dW of saved modules
    copied += sum(2 * site.out_features * site.in_features for site in bare)
    frozen = sum(2 * s.frozen_products * n / s.experts for s, n in parallel)  # Frozen factors get no gradient.
    per_batch = norms / job.batch_tokens  # DoRA's norm of W + ΔW is computed once per forward pass.
    forward = base + within + added + per_batch + dense
    backward = base + 2 * within + 2 * added - frozen + copied + 2 * dense
    again = _recomputation(shape, forward, job)
    again += accelerated.recomputed_flops(shape, counted, activations.fused_sublayers(shape, counted, job), job)
    return Flops(forward, backward, again, int8_flops(shape, job))


def full(shape: ModelShape, job: Job) -> Flops:
    """Return the FLOPs per token of full fine-tuning; dX and dW take twice the forward pass. [docs/math.md (33)]"""
    forward = matmuls(shape) + attention(shape, job.length_tokens)
    return Flops(forward, 2 * forward, _recomputation(shape, forward, job))


def _recomputation(shape: ModelShape, forward: float, job: Job) -> float:
    """Return the FLOPs that checkpointing recomputes: those of the blocks, but not those of the head."""
    if not job.gradient_checkpointing:
        return 0.0
    heads = sum(2 * s.weight_parameters for s in shape.sites if s.kind != EMBEDDING and not s.dense)
    return forward - heads


MATMUL_UTILIZATION = 0.88
"""Fraction of the calibrated rate that matmuls reach in a step ("GEMM baseline" of `benchmarks/bench_step.py`)."""

SECONDS_PER_ELEMENT = 0.9e-9
"""Thread-seconds per element read or written outside matmuls, including Python overhead and memory allocation.

The value is from the "lorakit" row of `benchmarks/bench_step.py` (SmolLM2-135M, bf16, 4 × 256 tokens, 2 threads of a
CPU without matrix units, dropout 0.05), minus the matmul time.
"""

LOGITS = 6
"""Number of reads and writes per logit: by the matmul, the casts to fp32 and back, and softmax."""


def elements(shape: ModelShape, job: Job) -> float:
    """Return how many elements per token an accelerated step reads or writes outside matmuls. [docs/math.md (37)]

    Slightly too high without rotary embeddings, or if some tokens do not contribute to the loss.
    """
    seen = (job.length_tokens + 1) / 2 if shape.causal else float(job.length_tokens)
    scores, keys = shape.heads * seen, shape.query_width + shape.kv_width
    forward = 10 * shape.hidden + (3 if shape.gated else 2) * shape.inner_width + 2 * keys + 2 * scores
    backward = 14 * shape.hidden + (8 if shape.gated else 5) * shape.inner_width + 2 * keys + 5 * scores
    again = forward if job.gradient_checkpointing else 0.0
    return len(shape.blocks) * (forward + backward + again) + LOGITS * shape.vocab


def token_seconds(shape: ModelShape, costs: Flops, job: Job, speed: Speed) -> float | None:
    """Return the seconds per token of an accelerated step, or None if `speed` is incomplete. [docs/math.md (37)]

    The speed must have a matmul rate and a number of threads.
    """
    if speed.flops_per_second is None or speed.threads is None or speed.tokens_per_second is not None:
        return None
    products = costs.at_dtype_rate(speed) / (speed.flops_per_second * MATMUL_UTILIZATION)
    return products + elements(shape, job) * SECONDS_PER_ELEMENT / speed.threads
