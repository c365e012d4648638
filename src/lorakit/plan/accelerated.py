"""Layouts of blocks by which activations are counted, and the activation memory of layers that are accelerated.

A decoder layer has two sublayers, attention and feed-forward, each with a norm before it and a residual connection. A
sublayer whose matmuls are all plain (see `fused`) runs as one autograd function; any other runs the model's own forward
pass, whose saved tensors `activations` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.architectures.families import BERT, BERT_BLOCK, GPT2, GPT2_BLOCK, LLAMA, PRE_NORM, architecture_of
from lorakit.architectures.layouts import Block, SublayerName, block_of
from lorakit.architectures.shapes import ModelShape
from lorakit.plan.job import Job
from lorakit.plan.params import Count, SiteCount

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
)
"""Modules that read the same tensor in blocks whose layout is not in the table: latent attention and shared experts."""


@dataclass(frozen=True)
class Family:
    """Layout of a model's blocks; `is_known` if the bytes that they save are exact, not estimated."""

    title: str
    block: Block
    is_known: bool

    def sublayer_of(self, path: str) -> SublayerName | None:
        """Return the sublayer that the module at this path belongs to, or None."""
        block = block_of(path)
        return None if block is None else self.block.sublayer_of(_inside(path))

    def reads_norm(self, path: str) -> bool:
        """Return whether the input of a linear module comes from a norm, not from attention or the activation."""
        return any(_inside(path) in group for group in self.block.inputs)

    def group_of(self, path: str) -> str:
        """Return a key that all linear modules (or their weights) share that read the same tensor."""
        path = path.removesuffix(".weight")
        groups = (*self.block.inputs, *SHARED_INPUTS)
        return next((f"{block_of(path)}.{group[0]}" for group in groups if _inside(path) in group), path)


def _inside(path: str) -> str:
    """Return the path of a module relative to its block, or the path itself for a module outside any block."""
    return path.removeprefix(f"{block_of(path)}.")


def family_of(shape: ModelShape) -> Family:
    """Return the family used for a model.

    An unknown architecture counts as Llama-like if its MLP is gated, else GPT-2-like if causal, else BERT-like.
    """
    nearest, block = (LLAMA, PRE_NORM) if shape.gated else (GPT2, GPT2_BLOCK) if shape.causal else (BERT, BERT_BLOCK)
    row = architecture_of(shape.architecture)
    if row is None or row.block is None:
        return Family(nearest.title, block, False)
    return Family(row.title or nearest.title, row.block, row.is_planned)


_FP32, _INDEX, _SEED = 4, 8, 8

SUBLAYERS = ("attention", "feed-forward")

FLASH_FROM = 2048
"""Minimum row length, in tokens, at which CPU attention also saves its output and one value per head and token."""

CHUNK_ROWS, CHUNK_BYTES = 256, 48 << 20
"""Maximum size of the logits that exist at once on a CPU, in rows and in bytes."""


def fused(shape: ModelShape, counted: Count, quantized: bool) -> frozenset[tuple[str, str]]:
    """Return all (block, sublayer) pairs that are fused; the shape's family must be known.

    A sublayer is fused if its matmuls are plain: no variants such as DoRA, no bias on B, no `target_parameters`, no
    saved modules, no trainable biases and no quantized weights. If norms follow the residuals, one function computes
    both sublayers, so either both are fused or neither.
    """
    if quantized or counted.biases:
        return frozenset()
    family = family_of(shape)
    others = [site.path for site in counted.sites if not site.is_plain or site.is_bare_matrix or site.experts > 1]
    left: set[tuple[str | None, str | None]] = {
        (block_of(path), family.sublayer_of(path)) for path in (*others, *counted.saved)
    }
    if family.block.is_post_norm:
        left |= {(block, name) for block, _ in left for name in SUBLAYERS}
    return frozenset(
        (block, sublayer) for block in shape.blocks for sublayer in SUBLAYERS if (block, sublayer) not in left
    )


def norm(shape: ModelShape, block: Block, job: Job) -> int:
    """Return the bytes per token that a norm saves: its input, and rms or mean and std. [docs/math.md (29)]"""
    return job.dtype_bytes * shape.hidden + (_FP32 if block.norm == "rms" else 2 * _FP32)


def sublayer_bytes(shape: ModelShape, sites: Sequence[SiteCount], name: str, dropout: float, job: Job) -> int:
    """Return the bytes that a fused sublayer with these sites saves, excluding its norm. [docs/math.md (29)]"""
    itemsize, tokens, family = job.dtype_bytes, job.batch_tokens, family_of(shape)
    if name == "attention":
        elements = shape.query_width + 2 * shape.kv_width
        dropout_p = shape.dropouts.get("attention", 0.0)
        flash = job.length_tokens >= FLASH_FROM and not dropout_p
        output = any(not family.reads_norm(site.path) and site.needs_input for site in sites)
        kept = itemsize * (elements + (shape.query_width if output or flash else 0))
        kept += _FP32 * shape.heads if flash else 0
        if any(o.path.endswith("q_norm") for o in shape.others):  # q and k are saved before their own norms
            kept += _FP32 * (shape.heads + shape.kv_heads)
    else:
        kept = 0 if job.recompute == "feed-forward" else itemsize * _inner(shape)
    kept += sum(job.matmul_bytes * site.rank for site in sites)
    seeds = len(sites) * (dropout > 0) + (shape.dropouts.get("residual", 0.0) > 0)
    seeds += name == "attention" and shape.dropouts.get("attention", 0.0) > 0
    return tokens * kept + _SEED * seeds


def separate_input(shape: ModelShape, sites: Sequence[SiteCount], name: str, job: Job) -> int:
    """Return the bytes of the input that a fused sublayer saves if no norm before it is fused with it.

    The size is 0 if neither a factor A nor a recomputed matmul needs the input.
    """
    family = family_of(shape)
    needed = job.recompute == name or any(family.reads_norm(site.path) and site.needs_input for site in sites)
    return job.dtype_bytes * job.batch_tokens * shape.hidden if needed else 0


def transient(shape: ModelShape, job: Job) -> int:
    """Return the peak size in bytes of the gradients in a fused layer's backward pass. [docs/math.md (29)]

    Included are the gradients of the norm's output and of the residual stream before and after the sublayer, and the
    larger of those of gate and up, or of q, k, v and the attention output. If matmuls upcast their operands, copies of
    the gradients of gate and up, and of the input and its gradient, exist in fp32.
    """
    inner = _inner(shape)
    heads = 2 * shape.query_width + 2 * shape.kv_width
    upcast = _FP32 * (inner + 2 * shape.hidden) if job.upcasts else 0
    return job.batch_tokens * (job.dtype_bytes * (3 * shape.hidden + max(inner, heads)) + upcast)


def recomputed_bytes(shape: ModelShape, fused: frozenset[tuple[str, str]], job: Job) -> int:
    """Return the bytes of the gate and up outputs that a layer's backward pass recomputes. [docs/math.md (85)]"""
    any_is = job.recompute == "feed-forward" and any(sublayer == "feed-forward" for _, sublayer in fused)
    return job.dtype_bytes * job.batch_tokens * _inner(shape) if any_is else 0


def recomputed_flops(shape: ModelShape, counted: Count, fused: frozenset[tuple[str, str]], job: Job) -> float:
    """Return the FLOPs per token that recompute gate and up; results of A are saved. [docs/math.md (85)]"""
    if job.recompute != "feed-forward":
        return 0.0

    family = family_of(shape)

    def is_inner(path: str) -> bool:
        sublayer = family.sublayer_of(path)
        return sublayer == "feed-forward" and (block_of(path), sublayer) in fused and family.reads_norm(path)

    base = sum(2.0 * site.weight_parameters for site in shape.sites if is_inner(site.path))
    return base + sum(2.0 * site.rank * site.out_features for site in counted.sites if is_inner(site.path))


def skips_logits(shape: ModelShape, counted: Count) -> bool:
    """Return whether the loss needs no logits: the head is not trained, adapted or tied to a trained embedding."""
    head = shape.head
    if head is None:
        return False
    trained = {*counted.saved, *counted.rows}
    return head.path not in {*trained, *(s.path for s in counted.sites)} and head.tied_to not in trained


def chunk_rows(shape: ModelShape, job: Job) -> int:
    """Return the rows per chunk of logits: a multiple of 16, at most 256 rows and 48 MiB. [docs/math.md (35)]"""
    fitting = CHUNK_BYTES // (shape.vocab * job.dtype_bytes) // 16 * 16
    return min(max(fitting, 16), CHUNK_ROWS, job.batch_tokens)


def loss_bytes(shape: ModelShape, job: Job) -> int:
    """Return the bytes that the loss saves, if every token contributes to it. [docs/math.md (35)]

    The loss saves the hidden states, their gradient, and the indices of the tokens that contribute.
    """
    return job.batch_tokens * (2 * job.dtype_bytes * shape.hidden + _INDEX)


def _inner(shape: ModelShape) -> int:
    """Return the number of elements per token in the outputs of the feed-forward sublayer's first matmuls."""
    return shape.intermediate * (2 if shape.gated else 1)
