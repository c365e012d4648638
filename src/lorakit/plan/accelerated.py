"""What a forward keeps for the backward where `lorakit.speed.accelerate` has put its functions in place of a layer's.

A decoder layer is two halves: norm, attention, residual; norm, feed-forward, residual. Each is one function of
autograd where everything in it is plain, else it runs as it is and keeps what `activations` says. Knows no family by
name, and nothing of what depends on more than one block, but for the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.architectures.shapes import ModelShape, block_of
from lorakit.plan.job import Job
from lorakit.plan.params import Count, SiteCount
from lorakit.targets.layer_types import EMBEDDING

_FP32, _INDEX, _SEED = 4, 8, 8

HALVES = {"self_attn": "attention", "attn": "attention", "mlp": "feed-forward"}
"""Child of a decoder layer -> the half it lies in."""

FLASH_FROM = 2048
"""Tokens of a row from which attention keeps its output and a number for each head and row, on a CPU."""

CHUNK_ROWS, CHUNK_BYTES = 256, 48 << 20
"""Most rows and most bytes of logits that exist at a time on a CPU."""

INNER = ("gate_proj", "up_proj", "c_fc")
"""Sites of a feed-forward that read what its norm gave."""


def half_of(path: str) -> str | None:
    """The half of a layer that a module lies in: "attention", "feed-forward", or None.

    Args:
        path: Dotted path of the module.
    """
    block = block_of(path)
    inside = "" if block is None else path.removeprefix(block + ".")
    return HALVES.get(inside.partition(".")[0])


def fused(shape: ModelShape, counted: Count, quantised: bool) -> frozenset[tuple[str, str]]:
    """Every (block, half) that runs as one function.

    A half does where its products are plain: no DoRA, no matrix as a bare parameter, no copied module, no trained bias,
    nothing quantised.

    Args:
        shape: The base, of a family whose layers are known.
        counted: The adapter.
        quantised: Whether the base is stored in fewer bits.
    """
    if quantised or counted.biases:
        return frozenset()
    others = [site.path for site in counted.sites if site.magnitudes or site.is_bare_matrix or site.experts > 1]
    left = {(block_of(path), half_of(path)) for path in (*others, *counted.saved)}
    return frozenset(
        (block, half) for block in shape.blocks for half in ("attention", "feed-forward") if (block, half) not in left
    )


def norm(shape: ModelShape, job: Job) -> int:
    """Bytes a token of a norm: its input, and one number for RMS or two for mean and deviation.   [docs/math.md (29)]

    Args:
        shape: The model.
        job: Its dtype.
    """
    return job.dtype_bytes * shape.hidden + (_FP32 if shape.gated else 2 * _FP32)


def half(shape: ModelShape, sites: Sequence[SiteCount], name: str, dropout: float, job: Job) -> int:
    """Bytes of a half that runs as one function, without its norm.   [docs/math.md (29)]

    Args:
        shape: The model.
        sites: The adapter's sites in this half of one block.
        name: "attention" or "feed-forward".
        dropout: `lora_dropout`.
        job: Batch, length, dtype.
    """
    number, tokens = job.dtype_bytes, job.batch_tokens
    if name == "attention":
        numbers = shape.query_width + 2 * shape.kv_width
        share = shape.dropouts.get("attention", 0.0)
        flash = job.length_tokens >= FLASH_FROM and not share
        output = any(not _reads_norm(site) and not site.frozen for site in sites)
        kept = number * (numbers + (shape.query_width if output or flash else 0))
        kept += _FP32 * shape.heads if flash else 0
        if any(o.path.endswith("q_norm") for o in shape.others):  # q and k are kept as they are before their own norms
            kept += _FP32 * (shape.heads + shape.kv_heads)
    else:
        kept = 0 if job.recompute == "feed-forward" else number * _inner(shape)
    kept += sum(number * site.rank for site in sites)
    seeds = len(sites) * (dropout > 0) + (shape.dropouts.get("residual", 0.0) > 0)
    seeds += name == "attention" and shape.dropouts.get("attention", 0.0) > 0
    return tokens * kept + _SEED * seeds


def input_alone(shape: ModelShape, sites: Sequence[SiteCount], job: Job) -> int:
    """Bytes of what a feed-forward reads, where its norm is not in its function and an A needs it, or its products.

    Args:
        shape: The model.
        sites: The adapter's sites in the feed-forward of one block.
        job: Batch, length, dtype.
    """
    needed = job.recompute == "feed-forward" or any(_reads_norm(site) and not site.frozen for site in sites)
    return job.dtype_bytes * job.batch_tokens * shape.hidden if needed else 0


def transient(shape: ModelShape, job: Job) -> int:
    """Bytes of gradients that live at once in the backward of a layer whose halves are functions.   [docs/math.md (29)]

    Of the stream before and after, what the norm gave; and of what gate and up gave, or of q, k, v and their output.

    Args:
        shape: The model.
        job: Batch, length, dtype.
    """
    inner = _inner(shape)
    heads = 2 * shape.query_width + 2 * shape.kv_width
    return job.dtype_bytes * job.batch_tokens * (3 * shape.hidden + max(inner, heads))


def made_again(shape: ModelShape, fused: frozenset[tuple[str, str]], job: Job) -> int:
    """Bytes of what gate and up give, while the backward of a layer has them once more.   [docs/math.md (85)]

    Args:
        shape: The model.
        fused: Every (block, half) that runs as one function.
        job: Batch, length, dtype, and what is computed again.
    """
    any_is = job.recompute == "feed-forward" and any(half == "feed-forward" for _, half in fused)
    return job.dtype_bytes * job.batch_tokens * _inner(shape) if any_is else 0


def products_again(shape: ModelShape, counted: Count, fused: frozenset[tuple[str, str]], job: Job) -> float:
    """FLOPs a token of gate and up, which the backward multiplies once more.   [docs/math.md (85)]

    The factors' first products are kept, their second ones are not.

    Args:
        shape: The model.
        counted: The adapter.
        fused: Every (block, half) that runs as one function.
        job: What is computed again.
    """
    if job.recompute != "feed-forward":
        return 0.0

    def is_inner(path: str) -> bool:
        return (block_of(path), half_of(path)) in fused and path.rpartition(".")[2] in INNER

    base = sum(2.0 * site.weight_parameters for site in shape.sites if is_inner(site.path))
    return base + sum(2.0 * site.rank * site.out_features for site in counted.sites if is_inner(site.path))


def makes_no_logits(shape: ModelShape, counted: Count) -> bool:
    """Whether the loss multiplies a frozen, plain head itself: nothing of the adapter is on it or on a tied weight.

    Args:
        shape: The model.
        counted: The adapter.
    """
    head = next((s for s in shape.sites if not s.dense and s.kind != EMBEDDING and s.out_features == shape.vocab), None)
    if head is None:
        return False
    trained = {*counted.saved, *counted.rows}
    return head.path not in {*trained, *(s.path for s in counted.sites)} and head.tied_to not in trained


def chunk_rows(shape: ModelShape, job: Job) -> int:
    """Rows of logits that exist at a time: a multiple of 16 up to 256, in 48 MiB.   [docs/math.md (35)]

    Args:
        shape: The model.
        job: Its dtype and batch.
    """
    fitting = CHUNK_BYTES // (shape.vocab * job.dtype_bytes) // 16 * 16
    return min(max(fitting, 16), CHUNK_ROWS, job.batch_tokens)


def loss_keeps(shape: ModelShape, job: Job) -> int:
    """Bytes that the loss keeps: the gradient of the hidden states, and which rows are trained.   [docs/math.md (35)]

    Args:
        shape: The model.
        job: Tokens of a batch; all are reckoned as trained.
    """
    return job.batch_tokens * (job.dtype_bytes * shape.hidden + _INDEX)


def _inner(shape: ModelShape) -> int:
    """Numbers of a token that the first products of a feed-forward give."""
    return shape.intermediate * (2 if shape.gated else 1)


def _reads_norm(site: SiteCount) -> bool:
    """Whether a site reads the output of the norm, and not that of attention or of the activation."""
    return site.path.rpartition(".")[2] in (*INNER, "q_proj", "k_proj", "v_proj", "c_attn")
