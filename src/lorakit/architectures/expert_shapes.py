"""Shapes of models with experts, built from the sizes in config.json, for the catalog of published models.

The experts of a layer share the parameters `gate_up_proj` and `down_proj`, as in transformers 5; the router is a module
with one matrix.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lorakit.architectures.families import PRE_NORM
from lorakit.architectures.layouts import BLOCK, DOWN, FUSED
from lorakit.architectures.shapes import HEAD_NORMS, ModelShape, PlainShape, Sizes, decoder, linears

_QKV = PRE_NORM.inputs[0]
_OUTPUT = PRE_NORM.outputs[0]
_ATTENTION = PRE_NORM.attention.inner
_EXPERTS = f"{BLOCK}.experts"


@dataclass(frozen=True)
class ExpertSizes(Sizes):
    """Sizes of a model with experts; `intermediate` is the inner width of one expert.

    Attributes:
        experts: Number of experts per layer; `experts_per_token` of them process each token.
        experts_per_token: Number of experts that process each token, without shared experts.
        shared_intermediate: Inner width of the shared expert, which processes every token; 0 if there is none.
        dense_blocks: Number of blocks, before all others, with a feed-forward block instead of experts.
        dense_intermediate: Inner width of that feed-forward block.
    """

    experts: int = 1
    experts_per_token: int = 1
    shared_intermediate: int = 0
    dense_blocks: int = 0
    dense_intermediate: int = 0


def mixtral(sizes: ExpertSizes) -> ModelShape:
    """Return the shape of a `MixtralForCausalLM`: Llama's attention, and experts in every block."""
    return _shape(sizes, "MixtralForCausalLM", "mixtral", [_router("gate", sizes), _experts(sizes)])


def qwen3_moe(sizes: ExpertSizes) -> ModelShape:
    """Return the shape of a `Qwen3MoeForCausalLM`: like Mixtral, with a norm on each query and key head."""
    norms = [PlainShape(path, sizes.head_dim) for path in HEAD_NORMS]
    return _shape(sizes, "Qwen3MoeForCausalLM", "qwen3_moe", [*norms, _experts(sizes), _router("gate", sizes)])


def olmoe(sizes: ExpertSizes) -> ModelShape:
    """Return the shape of an `OlmoeForCausalLM`: like Mixtral, with norms over all query heads and all key heads."""
    widths = (sizes.hidden, sizes.kv_heads * (sizes.hidden // sizes.heads))
    norms = [PlainShape(path, width) for path, width in zip(HEAD_NORMS, widths, strict=True)]
    return _shape(sizes, "OlmoeForCausalLM", "olmoe", [*norms, _router("gate", sizes), _experts(sizes)])


def gpt_oss(sizes: ExpertSizes) -> ModelShape:
    """Return the shape of a `GptOssForCausalLM`: sinks, and biases in attention, router and experts."""
    sinks = PlainShape(_ATTENTION, sizes.heads)
    biased = (*_QKV, _OUTPUT)
    parts = [sinks, _router("router", sizes, is_biased=True), _experts(sizes, is_biased=True, in_first=True)]
    return _shape(sizes, "GptOssForCausalLM", "gpt_oss", parts, biased)


def glm4_moe(sizes: ExpertSizes) -> ModelShape:
    """Return the shape of a `Glm4MoeForCausalLM`: biases of q, k and v, a shared expert, and dense blocks first."""
    return _shape(sizes, "Glm4MoeForCausalLM", "glm4_moe", [_experts(sizes), _router("gate", sizes)], _QKV)


def _experts(sizes: ExpertSizes, *, is_biased: bool = False, in_first: bool = False) -> PlainShape:
    """Return the fused experts of a block; `in_first` says that they are stored as (experts, in, out)."""
    count, d, f = sizes.experts, sizes.hidden, sizes.intermediate
    matrices: dict[str, tuple[int, ...]] = {}
    for name, out, inner in ((FUSED, 2 * f, d), (DOWN, d, f)):
        matrices[name] = (count, inner, out) if in_first else (count, out, inner)
        if is_biased:
            matrices[f"{name}_bias"] = (count, out)
    biases = count * (2 * f + d) if is_biased else 0
    return PlainShape(_EXPERTS, 3 * count * d * f + biases, biases, tuple(matrices.items()), count, in_first)


def _router(name: str, sizes: ExpertSizes, *, is_biased: bool = False) -> PlainShape:
    count, biases = sizes.experts, sizes.experts if is_biased else 0
    matrices = (("weight", (count, sizes.hidden)),)
    return PlainShape(f"{BLOCK}.{name}", count * sizes.hidden + biases, biases, matrices, count)


def _gated(module: str, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Return (out, in) for each linear module of a gated feed-forward block, or {} if its width is 0."""
    if not width:
        return {}
    inner = {f"{module}.{name}": (width, hidden) for name in ("gate_proj", "up_proj")}
    return inner | {f"{module}.down_proj": (hidden, width)}


def _shape(
    sizes: ExpertSizes, architecture: str, model_type: str, parts: Collection[PlainShape], biased: Collection[str] = ()
) -> ModelShape:
    """Return the shape of a model with experts.

    `parts` are the modules of a block with parameters, other than linear modules and the norms before its sublayers;
    dense blocks lack those of the experts and the router. `biased` are paths, in a block, of linear modules with a
    bias.
    """
    d, sizes_by_path = sizes.hidden, linears(PRE_NORM, sizes)
    attention = {path: sizes_by_path[path] for path in (*_QKV, _OUTPUT)}
    dense = attention | _gated(BLOCK, sizes.dense_intermediate, d)
    shared = attention | _gated(f"{BLOCK}.shared_experts", sizes.shared_intermediate, d)
    blocks = [(dense, [part for part in parts if not part.experts])] * sizes.dense_blocks
    blocks += [(shared, list(parts))] * (sizes.layers - sizes.dense_blocks)
    shape = decoder(sizes, architecture, blocks, biased)
    return replace(shape, model_type=model_type, experts_per_token=sizes.experts_per_token)
