"""Activation memory: the tensors that the forward pass saves for the backward pass, derived block by block.

The values are exact for four model families: the tests count saved tensors with
`torch.autograd.graph.saved_tensors_hooks`. Any other architecture is estimated as if it belonged to the most similar
family, and a note in the plan says so. A frozen linear layer does not save its input; a trainable factor A does.
`memory` handles vocabulary-sized tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorakit.architectures.shapes import ModelShape, SiteShape, block_of
from lorakit.plan import accelerated
from lorakit.plan.job import Job
from lorakit.plan.params import Count, SiteCount
from lorakit.plan.quantized import StoredBase
from lorakit.targets.layer_types import EMBEDDING

_FP32, _INDEX = 4, 8

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Sites of a block that share an input tensor, which is saved only once."""

ATTENTION_OUTPUTS = ("o_proj", "attn.c_proj", "attention.output.dense")
"""Sites whose input is always saved by fused attention."""


@dataclass(frozen=True)
class Family:
    """Activation memory of the blocks in a family of architectures.

    Attributes:
        name: Name shown in the plan.
        architectures: Names of the transformers classes for which the tests verify these sizes.
        norm: (width, bytes per element) -> bytes per token that each norm of a block saves.
        sublayers: Name ("attention" or "feed-forward") -> function (shape, job) -> bytes that the sublayer saves,
            excluding its norm and anything that the adapter adds.
        last_norm: (width, bytes per element) -> bytes per token that the norm before the head saves.
        trained_norms: (width, bytes per element) -> additional bytes per token that the norms of a block save if their
            weights are trained.
        is_fast: Whether `lorakit.speed.accelerate` has fused forward passes for the sublayers.
        norms: Number of norms per block: one before each sublayer, and possibly one after each.
    """

    name: str
    architectures: tuple[str, ...]
    norm: Callable[[int, int], int]
    sublayers: Mapping[str, Callable[[ModelShape, Job], int]]
    last_norm: Callable[[int, int], int]
    trained_norms: Callable[[int, int], int]
    is_fast: bool
    norms: int = 2

    def block(self, shape: ModelShape, job: Job) -> int:
        """Return the number of bytes that one block saves, excluding anything that the adapter adds.

        Args:
            shape: Shape of the model.
            job: The job, which sets the batch size, row length and dtype.
        """
        norms = self.norms * job.batch_tokens * self.norm(shape.hidden, job.dtype_bytes)
        return norms + sum(kept(shape, job) for kept in self.sublayers.values())


@dataclass(frozen=True)
class Activations:
    """Activation memory of one batch: everything that its forward pass saves for the backward pass.

    Attributes:
        family: The family used for the estimate.
        is_known: Whether the architecture belongs to the family; if not, the values are only approximate.
        blocks: Total size in bytes of the tensors that the blocks save.
        largest_block: Largest size in bytes of the tensors that a single block saves.
        outside: Size in bytes of the tensors saved before the first block and after the last one.
        boundary: Size of one block's input in bytes.
        blocks_kept: Number of blocks that save anything: the first adapted block and all later ones.
        transient: Size in bytes of the gradients that exist at once during one block's backward pass.
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


def _rms_norm(width: int, _: int) -> int:
    """Return how many bytes per token a norm saves: its input in fp32 (a copy if the model is in bf16) and rstd."""
    return _FP32 * width + _FP32


def _layer_norm(width: int, itemsize: int) -> int:
    """Return how many bytes per token a norm saves: its input, mean and rstd, all in the model's dtype."""
    return itemsize * (width + 2)


def _attention(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that scaled dot-product attention saves on a CPU.

    The fused kernel saves q, k, v, the output, and the log-sum-exp in fp32. With attention dropout, the math backend
    saves scaled q, scaled k, v, and three maps of size rows × heads × T² (probabilities, dropout mask and their
    product), all in fp32.
    """
    tokens, itemsize = job.batch_tokens, job.dtype_bytes
    if shape.dropouts.get("attention"):
        maps = job.batch_rows * shape.heads * job.length_tokens**2
        return _FP32 * (tokens * (shape.query_width + 2 * shape.kv_width) + 3 * maps)
    return tokens * (itemsize * 2 * (shape.query_width + shape.kv_width) + _FP32 * shape.heads)


def _llama_attention(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that attention and Qwen3's per-head norms save; rotary embeddings save nothing."""
    normed = any(o.path.endswith("q_norm") for o in shape.others)
    per_token = _FP32 * (shape.query_width + shape.kv_width + shape.heads + shape.kv_heads) if normed else 0
    return job.batch_tokens * per_token + _attention(shape, job)


def _swiglu(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that SwiGLU saves for the backward pass: gate, silu(gate) and up."""
    return job.batch_tokens * 3 * job.dtype_bytes * shape.inner_width


def _dropping_attention(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that attention and the subsequent dropout save for the backward pass."""
    return _attention(shape, job) + _noise(shape, job)


def _tanh_gelu(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that tanh-GELU (x, x/2, tanh and 1 + tanh) and the subsequent dropout save."""
    return 4 * job.batch_tokens * job.dtype_bytes * shape.intermediate + _noise(shape, job)


def _gelu(shape: ModelShape, job: Job) -> int:
    """Return the number of bytes that a fused GELU (its input) and the subsequent dropout save."""
    return job.batch_tokens * job.dtype_bytes * shape.intermediate + _noise(shape, job)


def _noise(shape: ModelShape, job: Job) -> int:
    return job.batch_tokens * job.dtype_bytes * shape.hidden if shape.dropouts.get("residual") else 0


_HEADS = ("ForSequenceClassification", "ForTokenClassification")
"""Endings of the classes of models that classify; their blocks are those of the language model."""

_LLAMA = Family(
    "Llama-like block (RMSNorm, rotary, SwiGLU, sdpa)",
    tuple(f"{name}{head}" for name in ("Llama", "Qwen2", "Qwen3", "Mistral") for head in ("ForCausalLM", *_HEADS)),
    _rms_norm,
    {"attention": _llama_attention, "feed-forward": _swiglu},
    _rms_norm,
    lambda width, itemsize: 2 * itemsize * width,
    is_fast=True,
)
_GEMMA3 = Family(
    "Gemma-3-like block (four RMSNorms, rotary, gated tanh-GELU, sdpa)",
    ("Gemma3ForCausalLM",),
    _rms_norm,
    {"attention": _llama_attention, "feed-forward": _swiglu},
    _rms_norm,
    lambda width, itemsize: 4 * itemsize * width,
    is_fast=True,
    norms=4,
)
_GPT2 = Family(
    "GPT-2-like block (LayerNorm, tanh-GELU, dropout)",
    tuple(f"GPT2{head}" for head in ("LMHeadModel", *_HEADS)),
    _layer_norm,
    {"attention": _dropping_attention, "feed-forward": _tanh_gelu},
    _layer_norm,
    lambda *_: 0,
    is_fast=True,
)
_BERT = Family(
    "BERT-like block (LayerNorm, GELU, dropout)",
    tuple(f"Bert{head}" for head in ("Model", "ForMaskedLM", *_HEADS)),
    _layer_norm,
    {"attention": _dropping_attention, "feed-forward": _gelu},
    lambda *_: 0,
    lambda *_: 0,
    is_fast=False,
)
FAMILIES: tuple[Family, ...] = (_LLAMA, _GEMMA3, _GPT2, _BERT)


def family_of(shape: ModelShape) -> tuple[Family, bool]:
    """Return the family used for an architecture, and whether the architecture is known to belong to it.

    Args:
        shape: Shape of the model. An unknown architecture counts as Llama-like if its MLP is gated, otherwise as
            GPT-2-like if it is causal, and otherwise as BERT-like.
    """
    for family in FAMILIES:
        if shape.architecture in family.architectures:
            return family, True
    if shape.gated:
        return _LLAMA, False
    return (_GPT2 if shape.causal else _BERT), False


def is_fast(shape: ModelShape) -> bool:
    """Return whether `lorakit.speed.accelerate` has fused forward passes for the blocks of this model.

    Args:
        shape: Shape of the model.
    """
    family, is_known = family_of(shape)
    return is_known and family.is_fast


def packs(shape: ModelShape) -> bool:
    """Return whether batches can be packed when this model is accelerated. [docs/math.md (36)]

    Rows that are classified are padded.

    Args:
        shape: Shape of the model.
    """
    return is_fast(shape) and shape.head is not None


def fused_sublayers(shape: ModelShape, counted: Count, job: Job) -> frozenset[tuple[str, str]]:
    """Return all (block, sublayer) pairs that are fused in a job.

    Args:
        shape: Shape of the base.
        counted: The adapter's parameter counts.
        job: The job, which sets acceleration and quantization.
    """
    if not (job.accelerated and is_fast(shape)):
        return frozenset()
    return accelerated.fused(shape, counted, job.quantization is not None)


def of_lora(shape: ModelShape, counted: Count, dropout: float, job: Job, base: StoredBase | None = None) -> Activations:
    """Return the activation memory of LoRA training on a frozen base. [docs/math.md (24)]

    For accelerated layers, see [docs/math.md (29)].

    Args:
        shape: Shape of the base.
        counted: The adapter's parameter counts.
        dropout: Value of `lora_dropout`. If above 0, each site saves its input after dropout and the dropout mask.
        job: The job, which sets the batch size, row length and dtype.
        base: The quantized base, or None if the base is not quantized.
    """
    family, _ = family_of(shape)
    inner = _inner(shape, counted)
    fast = job.accelerated and is_fast(shape)
    fused = fused_sublayers(shape, counted, job)
    norm = accelerated.norm(shape, job) if fast else family.norm(shape.hidden, job.dtype_bytes)
    last_norm = norm if fast else family.last_norm(shape.hidden, job.dtype_bytes)
    by_block = dict.fromkeys(inner, family.norms * job.batch_tokens * norm)
    outside = job.batch_tokens * last_norm
    plain = [site for site in counted.sites if (block_of(site.path), accelerated.sublayer_of(site.path)) not in fused]
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
    found = _gathered(shape, job, by_block, outside)
    transient = accelerated.transient(shape, job) if whole else found.transient
    transient += accelerated.recomputed_bytes(shape, fused, job)
    transient += 0 if base is None else _dequantized(counted, job, base)
    return replace(found, transient=transient, fused=here, of_blocks=2 * len(inner) if fast else 0)


def _of_sublayers(
    shape: ModelShape, counted: Count, dropout: float, job: Job, fused: frozenset[tuple[str, str]]
) -> Iterable[tuple[str, int]]:
    """Yield (block, bytes) for each sublayer of each block; a fused sublayer's bytes include those of its sites."""
    family, _ = family_of(shape)
    within: dict[tuple[str | None, str | None], list[SiteCount]] = {}
    for site in counted.sites:
        within.setdefault((block_of(site.path), accelerated.sublayer_of(site.path)), []).append(site)
    for block in shape.blocks:
        for name, plain in family.sublayers.items():
            sites = within.get((block, name), [])
            if (block, name) not in fused:
                yield block, plain(shape, job)
                continue
            yield block, accelerated.sublayer_bytes(shape, sites, name, dropout, job)
            if name == "feed-forward" and (block, "attention") not in fused:
                yield block, accelerated.separate_input(shape, sites, job)


def of_full(shape: ModelShape, job: Job) -> Activations:
    """Return the activation memory of full fine-tuning, which also saves matmul inputs and normalized activations.

    Args:
        shape: Shape of the model.
        job: The job, which sets the batch size, row length and dtype.
    """
    family, _ = family_of(shape)
    itemsize, tokens = job.dtype_bytes, job.batch_tokens
    each = family.block(shape, job) + tokens * family.trained_norms(shape.hidden, itemsize)
    by_block = dict.fromkeys(shape.blocks, each)
    outside = tokens * (family.last_norm(shape.hidden, itemsize) + itemsize * shape.hidden)
    for site in _distinct_inputs(shape, [s for s in shape.sites if s.kind != EMBEDDING]):
        block = block_of(site.path)
        if block is not None:
            by_block[block] += itemsize * tokens * site.in_features
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

    The inputs of the A factors come first, followed by each site's activation between A and B, and by the casts of A
    and B. If A is frozen by LoRA-FA, only the dropout mask is saved, not the input of A. An expert's A receives only
    the tokens routed to that expert. For a single matrix in `target_parameters`, each forward pass materializes
    W₀ + s·B·A and saves both this sum and the input.
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
        yield block_of(site.path), kept


def _of_base(
    shape: ModelShape, counted: Count, dropout: float, job: Job, base: StoredBase | None
) -> Iterable[tuple[str | None, int]]:
    """Yield (block, bytes) for what the matmuls of a quantized base save: their dequantized weights or their inputs.

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
    kept = {_input_of(site.path) for site in of_factors}
    for quantized in _distinct_inputs(shape, base.sites):
        if _input_of(quantized.path) not in kept:
            yield block_of(quantized.path), job.dtype_bytes * job.batch_tokens * quantized.in_features


def _dequantized(counted: Count, job: Job, base: StoredBase) -> int:
    """Return the size in bytes of the largest dequantized weight, which is in fp32 if DoRA computes its norm."""
    if counted.magnitudes:
        return _FP32 * base.largest
    return 0 if base.storage.keeps == "weight" else job.dtype_bytes * base.largest


def _distinct_inputs(
    shape: ModelShape, sites: Iterable[SiteCount] | Iterable[SiteShape]
) -> list[SiteCount | SiteShape]:
    """Return one site per distinct input tensor."""
    fused = not shape.dropouts.get("attention")
    found: dict[tuple[str, str], SiteCount | SiteShape] = {}
    for site in sites:
        if fused and site.path.removesuffix(".weight").endswith(ATTENTION_OUTPUTS):
            continue
        found.setdefault(_input_of(site.path), site)
    return list(found.values())


def _input_of(path: str) -> tuple[str, str]:
    """Return a key shared by all sites and bare parameters that receive the same input tensor."""
    parent, _, name = path.removesuffix(".weight").rpartition(".")
    return parent, next((group[0] for group in SHARED_INPUTS if name in group), name)


def _transient(shape: ModelShape, job: Job) -> int:
    """Return the size in bytes of the gradients that exist at the same time in the backward pass of an unfused block.

    The total covers the gradients of the residual stream, of the residual branch, and of the output and operands of a
    matmul in the branch. Attention dropout adds the gradients of two attention maps.
    """
    gradients = job.dtype_bytes * job.batch_tokens * (2 * shape.hidden + 3 * shape.inner_width)
    if shape.dropouts.get("attention"):
        gradients += 2 * _FP32 * job.batch_rows * shape.heads * job.length_tokens**2
    return gradients


def _gathered(shape: ModelShape, job: Job, by_block: dict[str, int], outside: int) -> Activations:
    family, is_known = family_of(shape)
    return Activations(
        family=family.name,
        is_known=is_known,
        blocks=sum(by_block.values()),
        largest_block=max(by_block.values(), default=0),
        outside=outside,
        boundary=job.dtype_bytes * job.batch_tokens * shape.hidden,
        blocks_kept=len(by_block),
        transient=_transient(shape, job),
    )
