"""How the parts of three families of models lie: GPT-2, BERT, and Llama with its kin (Qwen2, Qwen3, SmolLM2).

One function per family turns a handful of published sizes into the full list of sites, in the order in which
transformers' own class has them. The tests compare each list with that class on the meta device. This module knows
no particular model: those stand in `catalogue`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.plan.shapes import ModelShape, PlainShape, SiteShape


@dataclass(frozen=True)
class Sizes:
    """The sizes that a model's config.json states.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of blocks.
        heads: Query heads.
        vocab: Rows of the vocabulary.
        positions: Longest input in tokens.
        intermediate: Inner width of the MLP; 0 means 4 × hidden.
        kv_heads: Key and value heads; 0 means as many as query heads.
        head_dim: Width of a head; 0 means hidden / heads.
        tied: Whether the output head shares the input embedding.
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    positions: int
    intermediate: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = True


@dataclass(frozen=True)
class Origin:
    """What a shape is called and where it comes from.

    Attributes:
        name: What people call the model.
        source: Paper or config file.
        parameters: The exact published count; the tests check it.
        dtype: Type in which the weights are published.
    """

    name: str
    source: str
    parameters: int
    dtype: str


def gpt2(origin: Origin, sizes: Sizes) -> ModelShape:
    """Shape of a `GPT2LMHeadModel` (Radford et al. 2019; Conv1D sites, a tied head).

    Args:
        origin: Name, source, published count, dtype.
        sizes: From the model's config.json.

    Returns:
        The shape.
    """
    d, f = sizes.hidden, sizes.intermediate or 4 * sizes.hidden
    sites = [
        SiteShape("transformer.wte", "Embedding", d, sizes.vocab, dense=False),
        SiteShape("transformer.wpe", "Embedding", d, sizes.positions, dense=False),
    ]
    others = []
    for layer in range(sizes.layers):
        block = f"transformer.h.{layer}"
        others += [PlainShape(f"{block}.ln_1", 2 * d, d), PlainShape(f"{block}.ln_2", 2 * d, d)]
        sites += [
            SiteShape(f"{block}.attn.c_attn", "Conv1D", 3 * d, d, bias=True),
            SiteShape(f"{block}.attn.c_proj", "Conv1D", d, d, bias=True),
            SiteShape(f"{block}.mlp.c_fc", "Conv1D", f, d, bias=True),
            SiteShape(f"{block}.mlp.c_proj", "Conv1D", d, f, bias=True),
        ]
    others.append(PlainShape("transformer.ln_f", 2 * d, d))
    sites.append(SiteShape("lm_head", "Linear", sizes.vocab, d, dense=False, tied_to="transformer.wte"))
    dropouts = {"embedding": 0.1, "residual": 0.1, "attention": 0.1}
    return _shape(origin, sizes, "GPT2LMHeadModel", sites, others, dropouts=dropouts)


def bert(origin: Origin, sizes: Sizes) -> ModelShape:
    """Shape of a `BertModel`, encoder and pooler (Devlin et al. 2019); task heads come on top.

    Args:
        origin: Name, source, published count, dtype.
        sizes: From the model's config.json.

    Returns:
        The shape.
    """
    d, f = sizes.hidden, sizes.intermediate or 4 * sizes.hidden
    sites = [
        SiteShape("embeddings.word_embeddings", "Embedding", d, sizes.vocab, dense=False),
        SiteShape("embeddings.position_embeddings", "Embedding", d, sizes.positions, dense=False),
        SiteShape("embeddings.token_type_embeddings", "Embedding", d, 2, dense=False),
    ]
    others = [PlainShape("embeddings.LayerNorm", 2 * d, d)]
    for layer in range(sizes.layers):
        block = f"encoder.layer.{layer}"
        sites += [
            *(SiteShape(f"{block}.attention.self.{n}", "Linear", d, d, bias=True) for n in ("query", "key", "value")),
            SiteShape(f"{block}.attention.output.dense", "Linear", d, d, bias=True),
            SiteShape(f"{block}.intermediate.dense", "Linear", f, d, bias=True),
            SiteShape(f"{block}.output.dense", "Linear", d, f, bias=True),
        ]
        others += [
            PlainShape(f"{block}.attention.output.LayerNorm", 2 * d, d),
            PlainShape(f"{block}.output.LayerNorm", 2 * d, d),
        ]
    sites.append(SiteShape("pooler.dense", "Linear", d, d, bias=True))
    dropouts = {"embedding": 0.1, "residual": 0.1, "attention": 0.1}
    return _shape(origin, sizes, "BertModel", sites, others, dropouts=dropouts)


def llama(origin: Origin, sizes: Sizes) -> ModelShape:
    """Shape of a `LlamaForCausalLM` (Llama 3.x, SmolLM2): RMSNorm, rotary positions, SwiGLU, no biases.

    Args:
        origin: Name, source, published count, dtype.
        sizes: From the model's config.json.

    Returns:
        The shape.
    """
    return _llama_like(origin, sizes, "LlamaForCausalLM")


def qwen2(origin: Origin, sizes: Sizes) -> ModelShape:
    """Shape of a `Qwen2ForCausalLM` (Qwen2.5): Llama's parts, with a bias on query, key and value.

    Args:
        origin: Name, source, published count, dtype.
        sizes: From the model's config.json.

    Returns:
        The shape.
    """
    return _llama_like(origin, sizes, "Qwen2ForCausalLM", qkv_bias=True)


def qwen3(origin: Origin, sizes: Sizes) -> ModelShape:
    """Shape of a `Qwen3ForCausalLM`: Llama's parts, with a norm on each query and key head.

    Args:
        origin: Name, source, published count, dtype.
        sizes: From the model's config.json.

    Returns:
        The shape.
    """
    return _llama_like(origin, sizes, "Qwen3ForCausalLM", head_norms=True)


def _llama_like(
    origin: Origin, sizes: Sizes, architecture: str, *, qkv_bias: bool = False, head_norms: bool = False
) -> ModelShape:
    d, f = sizes.hidden, sizes.intermediate
    head_dim = sizes.head_dim or d // sizes.heads
    q, kv = sizes.heads * head_dim, (sizes.kv_heads or sizes.heads) * head_dim
    sites = [SiteShape("model.embed_tokens", "Embedding", d, sizes.vocab, dense=False)]
    others = []
    for layer in range(sizes.layers):
        block = f"model.layers.{layer}"
        sites += [
            SiteShape(f"{block}.self_attn.q_proj", "Linear", q, d, bias=qkv_bias),
            SiteShape(f"{block}.self_attn.k_proj", "Linear", kv, d, bias=qkv_bias),
            SiteShape(f"{block}.self_attn.v_proj", "Linear", kv, d, bias=qkv_bias),
            SiteShape(f"{block}.self_attn.o_proj", "Linear", d, q),
            SiteShape(f"{block}.mlp.gate_proj", "Linear", f, d),
            SiteShape(f"{block}.mlp.up_proj", "Linear", f, d),
            SiteShape(f"{block}.mlp.down_proj", "Linear", d, f),
        ]
        if head_norms:
            others += [PlainShape(f"{block}.self_attn.{n}_norm", head_dim) for n in "qk"]
        others += [PlainShape(f"{block}.{n}_layernorm", d) for n in ("input", "post_attention")]
    others.append(PlainShape("model.norm", d))
    tied_to = "model.embed_tokens" if sizes.tied else None
    sites.append(SiteShape("lm_head", "Linear", sizes.vocab, d, dense=False, tied_to=tied_to))
    return _shape(origin, sizes, architecture, sites, others, gated=True)


def _shape(
    origin: Origin,
    sizes: Sizes,
    architecture: str,
    sites: list[SiteShape],
    others: list[PlainShape],
    *,
    gated: bool = False,
    dropouts: dict[str, float] | None = None,
) -> ModelShape:
    owners = [s.path for s in sites] + [o.path for o in others]
    parents = {p.rsplit(".", n)[0] for p in owners for n in range(1, p.count(".") + 1)}
    return ModelShape(
        name=origin.name,
        source=origin.source,
        architecture=architecture,
        parameters=origin.parameters,
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads or sizes.heads,
        head_dim=sizes.head_dim or sizes.hidden // sizes.heads,
        intermediate=sizes.intermediate or 4 * sizes.hidden,
        vocab=sizes.vocab,
        positions=sizes.positions,
        tied=sizes.tied,
        gated=gated,
        sites=tuple(sites),
        others=tuple(others),
        dtype=origin.dtype,
        causal=architecture != "BertModel",
        dropouts=dropouts or {},
        published=True,
        containers=tuple(sorted(parents)),
    )
