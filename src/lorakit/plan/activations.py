"""Activation memory: the tensors that the forward pass saves for the backward pass, derived block by block.

The values are exact for the architectures with `is_planned` in `lorakit.architectures.families`; any other is estimated
as the most similar family, and a note in the plan says so. `memory` handles vocabulary-sized tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lorakit.architectures.families import GATED
from lorakit.architectures.layouts import Block, block_of
from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.choices import EMBEDDING
from lorakit.plan import accelerated
from lorakit.plan.accelerated import family_of
from lorakit.plan.job import Job
from lorakit.plan.packed import W8A8, packed_files, product_bytes
from lorakit.plan.params import Count, SiteCount
from lorakit.plan.quantized import StoredBase

_FP32, _INDEX = 4, 8


@dataclass(frozen=True)
class Activations:
    """Activation memory of one batch, in bytes: everything that its forward pass saves for the backward pass.

    Attributes:
        is_known: Whether the architecture belongs to the family; if not, the values are only approximate.
        blocks: Size of the tensors that the blocks save.
        outside: Size of the tensors saved before the first block and after the last one.
        boundary: Size of one block's input.
        blocks_kept: Number of blocks that save anything: the first adapted block and all later ones.
        transient: Size of the gradients that exist at once during one block's backward pass.
        fused: Number of fused sublayers, out of `of_blocks`.
        of_blocks: Number of sublayers that save anything, or 0 if none can be fused.
    """

    family: str
    is_known: bool
    blocks: int
    largest_block: int
    outside: int
    boundary: int
    blocks_kept: int
    transient: int
    fused: int = 0
    of_blocks: int = 0


def _norm(block: Block, width: int, itemsize: int) -> int:
    """Return how many bytes per token a norm of the model's own forward pass saves.

    An RMSNorm saves its input and rstd in fp32; a layer norm saves its input, mean and rstd in the model's dtype.
    """
    return _FP32 * (width + 1) if block.norm == "rms" else itemsize * (width + 2)


def _attention(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that attention, the norms of q and k, and the dropout after attention save on a CPU.

    The fused kernel of scaled dot-product attention saves q, k, v, the output, and the log-sum-exp in fp32. With
    attention dropout, the math backend saves scaled q, scaled k, v, and three maps of size rows × heads × T²
    (probabilities, dropout mask and their product), all in fp32. Rotary embeddings save nothing.
    """
    tokens, itemsize = job.batch_tokens, job.dtype_bytes
    kept = _noise(shape, job)
    if any(other.path.endswith("q_norm") for other in shape.others):
        kept += tokens * _FP32 * (shape.query_width + shape.kv_width + shape.heads + shape.kv_heads)
    if shape.dropouts.get("attention"):
        maps = job.batch_rows * shape.heads * job.length_tokens**2
        return kept + _FP32 * (tokens * (shape.query_width + 2 * shape.kv_width) + 3 * maps)
    return kept + tokens * (itemsize * 2 * (shape.query_width + shape.kv_width) + _FP32 * shape.heads)


def _feed_forward(block: Block, shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that the activation of a feed-forward block and the dropout after the block save.

    Saved are gate, act(gate) and up (SwiGLU, for experts too); x, x/2, tanh and 1 + tanh (tanh-GELU); or x (GELU).
    Each expert that processes a token also saves its output, which is multiplied by the router's weight.
    """
    saved = GATED.saved if block.feed_forward_modules is None else block.feed_forward_modules.saved
    outputs = shape.hidden * shape.passed(shape.fused[0][0]) if shape.fused else 0
    return job.batch_tokens * job.dtype_bytes * (shape.inner_width * saved + outputs) + _noise(shape, job)


def _noise(shape: ModelShape, job: Job) -> int:
    return job.batch_tokens * job.dtype_bytes * shape.hidden if shape.dropouts.get("residual") else 0


def is_fast(shape: ModelShape) -> bool:
    """Return whether `lorakit.speed.accelerate` has fused forward passes for the blocks of this model."""
    return family_of(shape).is_known


def packs(shape: ModelShape) -> bool:
    """Return whether an accelerated model packs batches; rows that are classified are padded. [docs/math.md (36)]"""
    return is_fast(shape) and shape.causal and shape.head is not None


def fused_sublayers(shape: ModelShape, counted: Count, job: Job) -> frozenset[tuple[str, str]]:
    """Return all (block, sublayer) pairs that are fused in a job."""
    if not (job.accelerated and is_fast(shape)):
        return frozenset()
    files = packed_files(shape)
    is_quantized = job.quantization is not None or (files is not None and files.base is not None)
    return accelerated.fused(shape, counted, is_quantized)


def of_lora(shape: ModelShape, counted: Count, dropout: float, job: Job, base: StoredBase | None = None) -> Activations:
    """Return the activation memory of LoRA training. [docs/math.md (24)]

    For accelerated layers, see [docs/math.md (29)]. With `dropout` above 0, each site saves its input after dropout and
    the mask. `base` is None if it is not quantized.
    """
    family = family_of(shape)
    inner = _inner(shape, counted)
    fast = job.accelerated and is_fast(shape)
    fused = fused_sublayers(shape, counted, job)
    layout = family.block
    norm = accelerated.norm(shape, layout, job) if fast else _norm(layout, shape.hidden, job.dtype_bytes)
    by_block = dict.fromkeys(inner, len(layout.norms) * job.batch_tokens * norm)
    outside = 0 if layout.is_post_norm else job.batch_tokens * norm
    plain = [site for site in counted.sites if (block_of(site.path), family.sublayer_of(site.path)) not in fused]
    for block, kept in (
        *_of_sublayers(shape, counted, dropout, job, fused),
        *_of_sites(shape, plain, dropout, job),
        *_of_base(shape, counted, dropout, job, base),
    ):
        if block in by_block:
            by_block[block] += kept
        elif block is None:  # blocks before the first adapted one save nothing
            outside += kept
    here = sum(block in by_block for block, _ in fused)
    whole = fast and here == 2 * len(inner)
    gathered = _gathered(shape, job, by_block, outside)
    transient = accelerated.transient(shape, job) if whole else gathered.transient
    transient += accelerated.recomputed_bytes(shape, fused, job)
    transient += 0 if base is None else _dequantized(counted, job, base)
    return replace(gathered, transient=transient, fused=here, of_blocks=2 * len(inner) if fast else 0)


def _of_sublayers(
    shape: ModelShape, counted: Count, dropout: float, job: Job, fused: frozenset[tuple[str, str]]
) -> Iterable[tuple[str, int]]:
    """Yield (block, bytes) for each sublayer of each block; a fused sublayer's bytes include those of its sites."""
    family = family_of(shape)
    plain = {"attention": _attention(shape, job), "feed-forward": _feed_forward(family.block, shape, job)}
    within: dict[tuple[str | None, str | None], list[SiteCount]] = {}
    for site in counted.sites:
        within.setdefault((block_of(site.path), family.sublayer_of(site.path)), []).append(site)
    for block in shape.blocks:
        for name, kept in plain.items():
            sites = within.get((block, name), [])
            if (block, name) not in fused:
                yield block, kept
                continue
            yield block, accelerated.sublayer_bytes(shape, sites, name, dropout, job)
            is_behind_fused = name == "feed-forward" and (block, "attention") in fused
            if family.block.is_post_norm or not (name == "attention" or is_behind_fused):
                yield block, accelerated.separate_input(shape, sites, name, job)


def of_full(shape: ModelShape, job: Job) -> Activations:
    """Return the activation memory of full fine-tuning, which also saves matmul inputs and normalized activations."""
    block = family_of(shape).block
    itemsize, tokens = job.dtype_bytes, job.batch_tokens
    norm = _norm(block, shape.hidden, itemsize)
    trained = itemsize * shape.hidden if block.norm == "rms" else 0  # saved by a norm whose weight is trained
    each = tokens * len(block.norms) * (norm + trained) + _attention(shape, job) + _feed_forward(block, shape, job)
    by_block = dict.fromkeys(shape.blocks, each)
    outside = tokens * ((0 if block.is_post_norm else norm) + itemsize * shape.hidden)
    for site in _distinct_inputs(shape, [s for s in shape.sites if s.kind != EMBEDDING]):
        inside = block_of(site.path)
        if inside is not None:
            by_block[inside] += itemsize * tokens * site.in_features
    return _gathered(shape, job, by_block, outside)


def _inner(shape: ModelShape, counted: Count) -> tuple[str, ...]:
    """Return the blocks that save anything: the first one with trainable parameters, and all later ones."""
    paths = [*(site.path for site in counted.sites), *counted.saved, *counted.rows]
    blocks = shape.blocks
    below = any(s.path in paths for s in shape.sites if s.kind == EMBEDDING)
    if below or counted.biases:
        return blocks
    trained = {block_of(path) for path in paths}
    first = next((index for index, block in enumerate(blocks) if block in trained), len(blocks))
    return blocks[first:]


def _of_sites(
    shape: ModelShape, sites: Sequence[SiteCount], dropout: float, job: Job
) -> Iterable[tuple[str | None, int]]:
    """Yield (block, bytes) for everything that the given sites save.

    Inputs of the A factors, each site's activation between A and B, and casts of A and B. If A is frozen (LoRA-FA),
    only the dropout mask is saved. An expert's A receives only the tokens routed to it. For a single matrix in
    `target_parameters`, each forward pass materializes W₀ + s·B·A and saves both this sum and the input.
    """
    tokens, itemsize = job.batch_tokens, job.dtype_bytes
    dense = [site for site in sites if site.kind != EMBEDDING]
    seen = {site.path: tokens * (shape.passed(site.experts) if site.experts > 1 else 1) for site in sites}
    inputs = dense if dropout else _distinct_inputs(shape, [site for site in dense if site.needs_input])
    for site in inputs:
        copies = 0 if isinstance(site, SiteCount) and not site.needs_input else 1
        yield block_of(site.path), (copies + bool(dropout)) * itemsize * seen[site.path] * site.in_features
    for site in sites:
        kept = itemsize * seen[site.path] * site.rank
        if site.is_bare_matrix:
            kept = itemsize * site.out_features * site.in_features
        if site.kind == EMBEDDING:
            kept += _INDEX * tokens
        if itemsize != _FP32:
            kept += itemsize * site.factors  # A and B are fp32; the matmul uses a copy in the base's dtype
        if site.magnitudes:
            kept += 2 * itemsize * tokens * site.out_features  # y₀ − b and z, which DoRA multiplies by its scale
        yield block_of(site.path), kept + _FP32 * site.random_numbers


def _of_base(
    shape: ModelShape, counted: Count, dropout: float, job: Job, base: StoredBase | None
) -> Iterable[tuple[str | None, int]]:
    """Yield (block, bytes) for the dequantized weights or inputs that a quantized base's matmuls save.

    An input that a factor A also saves is counted only once, unless dropout is applied before A.
    """
    if base is None or base.storage.keeps == "nothing":
        return
    if base.storage.keeps == "weight":
        for site in base.sites:
            yield block_of(site.path), job.dtype_bytes * site.weight_parameters
        return
    learning = [] if dropout else [s for s in counted.sites if s.kind != EMBEDDING and s.needs_input]
    of_factors = _distinct_inputs(shape, learning)
    family = family_of(shape)
    kept = {family.group_of(site.path) for site in of_factors}
    for quantized in _distinct_inputs(shape, base.sites):
        if family.group_of(quantized.path) not in kept:
            yield block_of(quantized.path), job.dtype_bytes * job.batch_tokens * quantized.in_features


def _dequantized(counted: Count, job: Job, base: StoredBase) -> int:
    """Return the size in bytes of the largest dequantized weight, or of what an int8 matmul needs for a short time."""
    if base.storage is W8A8 and not counted.magnitudes:
        return product_bytes(base, job)
    if counted.magnitudes:
        return max(_FP32, base.storage.decode_bytes) * base.largest
    each = base.storage.decode_bytes or job.dtype_bytes
    return 0 if base.storage.keeps == "weight" else each * base.largest


def _distinct_inputs(
    shape: ModelShape, sites: Iterable[SiteCount] | Iterable[SiteShape]
) -> list[SiteCount | SiteShape]:
    """Return one site per distinct input tensor; attention without dropout saves its output anyway."""
    family = family_of(shape)
    output = "" if shape.dropouts.get("attention") else family.block.outputs[0]
    by_input: dict[str, SiteCount | SiteShape] = {}
    for site in sites:
        path = site.path.removesuffix(".weight")
        if not output or path != f"{block_of(path)}.{output}":
            by_input.setdefault(family.group_of(path), site)
    return list(by_input.values())


def _transient(shape: ModelShape, job: Job) -> int:
    """Return the size in bytes of the gradients that exist at once in an unfused block's backward pass.

    Those of the residual stream and branch, of a matmul's output and operands, and of two attention maps with dropout.
    """
    gradients = job.dtype_bytes * job.batch_tokens * (2 * shape.hidden + 3 * shape.inner_width)
    if shape.dropouts.get("attention"):
        gradients += 2 * _FP32 * job.batch_rows * shape.heads * job.length_tokens**2
    return gradients


def _gathered(shape: ModelShape, job: Job, by_block: dict[str, int], outside: int) -> Activations:
    family = family_of(shape)
    return Activations(
        family=family.title,
        is_known=family.is_known,
        blocks=sum(by_block.values()),
        largest_block=max(by_block.values(), default=0),
        outside=outside,
        boundary=job.dtype_bytes * job.batch_tokens * shape.hidden,
        blocks_kept=len(by_block),
        transient=_transient(shape, job),
    )
