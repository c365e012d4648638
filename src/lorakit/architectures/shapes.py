"""Model shapes: names and sizes of a model's modules, from which `plan` estimates costs.

A `ModelShape` comes from `lorakit.plan.catalogue` (published models), with one function per family here, or from
`lorakit.hub`, which creates any model on the meta device. Modules are in the order of the `transformers` class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any

from lorakit.architectures.families import BERT_BLOCK, GPT2_BLOCK, PRE_NORM
from lorakit.architectures.layouts import SHARED, Block, block_of
from lorakit.durable import JsonValue
from lorakit.errors import ConfigError

HEAD_NORMS = PRE_NORM.attention.at(PRE_NORM.attention_modules.norms)
ALL_DROPOUTS = {"embedding": 0.1, "residual": 0.1, "attention": 0.1}


@dataclass(frozen=True)
class SiteShape:
    """A module that an adapter can be attached to.

    Attributes:
        kind: "Linear", "Conv1D" or "Embedding".
        out_features: Number of rows of the weight in nn.Linear's orientation; for an Embedding, the embedding
            dimension.
        in_features: Number of columns of the weight in that orientation; for an Embedding, the number of embeddings.
        dense: Whether "all-linear" selects the module (a Linear or Conv1D that is not the output head).
        tied_to: Path of the module whose weight this module shares (the weight is then counted only there), or None.
    """

    path: str
    kind: str
    out_features: int
    in_features: int
    dense: bool = True
    bias: bool = False
    tied_to: str | None = None

    @property
    def weight_parameters(self) -> int:
        """Return the number of elements in the weight, whether or not it is shared."""
        return self.out_features * self.in_features

    @property
    def bias_parameters(self) -> int:
        """Return the number of elements in the bias; 0 if there is none."""
        return self.out_features if self.bias else 0

    @property
    def parameters(self) -> int:
        """Return the number of parameters that this module adds to the model; a shared weight adds none."""
        return (0 if self.tied_to else self.weight_parameters) + self.bias_parameters


@dataclass(frozen=True)
class PlainShape:
    """A module that has parameters but is not a Linear, Conv1D or Embedding, such as a norm.

    Attributes:
        parameters: Number of elements in the module's parameters, excluding submodules; shared storage counts once.
        biases: Number of these elements that belong to parameters with "bias" in their names.
        matrices: Name and shape of each parameter that has two or three axes, such as a tensor of fused experts.
        experts: Number of experts in each three-axis parameter; 0 if the module has no such parameters.
        in_first: Whether the experts are stored as (experts, in, out).
    """

    path: str
    parameters: int
    biases: int = 0
    matrices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    experts: int = 0
    in_first: bool = False


@dataclass(frozen=True)
class ModelShape:
    """Names and sizes of a model's modules, from which plans are computed.

    Attributes:
        source: Origin of the shape: a paper, a config file or a path.
        parameters: Exact number of parameters; tied weights count once.
        intermediate: Inner width of the MLP, or of each expert.
        vocab: Size of the vocabulary, which is also the width of the logits.
        gated: Whether the MLP is gated, as in SwiGLU.
        sites: Every Linear, Conv1D and Embedding in the order of `named_modules()`.
        others: Every other module that owns parameters, in the same order.
        dtype: Published dtype of the weights, such as "float32".
        causal: Whether each token attends only to itself and to earlier tokens.
        dropouts: Dropout rates of the base during training: {"embedding": p, "residual": p, "attention": p}; a missing
            key means 0.
        published: Whether `source` names a published model; False for a model read from disk.
        containers: Paths of modules without parameters of their own; a target list may name such a module by mistake.
        experts_per_token: Number of fused experts that process each token; 0 if there are none or if the number is
            unknown.
        model_type: The `model_type` of the model's config, or "" for a published model without experts.
        quantization: The quantization config of the model's files; empty if they are not quantized.
        full_modules: Paths of modules that the model's task trains in full and that are not quantized: a head for
            classification, and modules that the model's files lack.
        unused_modules: Paths of layers whose output the task does not use, such as BERT's pooler for embeddings.
        converted_bytes: Size of a GGUF file that is converted before the model is loaded; 0 for other models.
    """

    name: str
    source: str
    architecture: str
    parameters: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    tied: bool
    gated: bool
    sites: tuple[SiteShape, ...]
    others: tuple[PlainShape, ...] = ()
    dtype: str = "float32"
    causal: bool = True
    dropouts: dict[str, float] = field(default_factory=dict)
    published: bool = False
    containers: tuple[str, ...] = ()
    experts_per_token: int = 0
    full_modules: tuple[str, ...] = ()
    unused_modules: tuple[str, ...] = ()
    model_type: str = ""
    quantization: Mapping[str, JsonValue] = field(default_factory=dict)
    converted_bytes: int = 0

    @property
    def fused(self) -> tuple[tuple[int, int], ...]:
        """Return (number of experts, elements per expert) for each parameter that contains experts."""
        return tuple((count, rows * columns) for count, rows, columns in self.expert_matrices)

    @property
    def expert_matrices(self) -> tuple[tuple[int, int, int], ...]:
        """Return (number of experts, rows, columns) for each parameter that contains experts."""
        matrices_of_experts = (other.matrices for other in self.others if other.experts)
        sizes = (size for matrices in matrices_of_experts for _, size in matrices if len(size) == 3)
        return tuple((count, rows, columns) for count, rows, columns in sizes)

    def passed(self, experts: int) -> int:
        """Return how many of `experts` experts process each token; if that is unknown, return `experts`."""
        return min(self.experts_per_token or experts, experts)

    @property
    def active_parameters(self) -> int:
        """Return the number of parameters without those of experts that a token does not pass through."""
        fused = (other for other in self.others if any(len(size) == 3 for _, size in other.matrices))
        sizes = (size for other in fused if other.experts for _, size in other.matrices if size[0] == other.experts)
        return self.parameters - sum((size[0] - self.passed(size[0])) * prod(size[1:]) for size in sizes)

    @property
    def shared_width(self) -> int:
        """Return the inner width of the shared expert of a layer, through which every token passes, or 0."""
        inner = (site for site in self.sites if SHARED in site.path and site.path.endswith(".up_proj"))
        return max((site.out_features for site in inner), default=0)

    @property
    def inner_width(self) -> int:
        """Return the inner width of the MLP, summed over the experts that process a token, shared ones included."""
        through = self.passed(self.fused[0][0]) if self.fused else 1
        return self.intermediate * through + self.shared_width

    @property
    def query_width(self) -> int:
        """Return heads × head_dim, the width of the queries and of the attention output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Return kv_heads × head_dim, the width of the keys and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> SiteShape | None:
        """Return the language modeling head, or None if the model has none."""
        return next((site for site in self.sites if not site.dense and site.out_features == self.vocab), None)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the paths of all blocks, including those of an encoder, in order, such as "model.layers.0"."""
        return tuple(dict.fromkeys(block for site in self.sites if (block := block_of(site.path)) is not None))


@dataclass(frozen=True)
class Sizes:
    """Sizes from a model's config.json.

    Attributes:
        intermediate: Inner width of the MLP; 0 means 4 × hidden.
        kv_heads: Number of key and value heads; 0 means as many as query heads.
        head_dim: Width of a head; 0 means hidden / heads.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate", self.intermediate or 4 * self.hidden)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden // self.heads)


def gpt2(sizes: Sizes) -> ModelShape:
    """Return the shape of a `GPT2LMHeadModel` (Radford et al. 2019), with Conv1D sites and a tied head."""
    d = sizes.hidden
    sites = [
        *embeddings(d, {"transformer.wte": sizes.vocab, "transformer.wpe": sizes.positions}),
        *_in_blocks("transformer.h", GPT2_BLOCK, sizes, "Conv1D"),
        SiteShape("lm_head", "Linear", sizes.vocab, d, dense=False, tied_to="transformer.wte"),
    ]
    names = [f"transformer.h.{layer}.{name}" for layer in range(sizes.layers) for name in GPT2_BLOCK.norms]
    others = [PlainShape(name, 2 * d, d) for name in (*names, "transformer.ln_f")]
    return shape_from(sizes, "GPT2LMHeadModel", sites, others, dropouts=ALL_DROPOUTS)


def bert(sizes: Sizes) -> ModelShape:
    """Return the shape of a `BertModel` (Devlin et al. 2019): encoder and pooler, without task heads."""
    d = sizes.hidden
    tables = {"word": sizes.vocab, "position": sizes.positions, "token_type": 2}
    sites = [
        *embeddings(d, {f"embeddings.{name}_embeddings": rows for name, rows in tables.items()}),
        *_in_blocks("encoder.layer", BERT_BLOCK, sizes),
        SiteShape("pooler.dense", "Linear", d, d, bias=True),
    ]
    names = [f"encoder.layer.{layer}.{name}" for layer in range(sizes.layers) for name in BERT_BLOCK.norms]
    others = [PlainShape(name, 2 * d, d) for name in ("embeddings.LayerNorm", *names)]
    return shape_from(sizes, "BertModel", sites, others, dropouts=ALL_DROPOUTS)


def llama(sizes: Sizes) -> ModelShape:
    """Return the shape of a `LlamaForCausalLM` (Llama 3.x, SmolLM2): RMSNorm, rotary, SwiGLU, no biases."""
    return _llama_like(sizes, "LlamaForCausalLM")


def qwen2(sizes: Sizes) -> ModelShape:
    """Return the shape of a `Qwen2ForCausalLM` (Qwen2.5): like Llama, with biases of query, key and value."""
    return _llama_like(sizes, "Qwen2ForCausalLM", biased=PRE_NORM.inputs[0])


def qwen3(sizes: Sizes) -> ModelShape:
    """Return the shape of a `Qwen3ForCausalLM`: like Llama, with a norm on each query and key head."""
    return _llama_like(sizes, "Qwen3ForCausalLM", head_norms=True)


def _llama_like(
    sizes: Sizes, architecture: str, *, biased: Collection[str] = (), head_norms: bool = False
) -> ModelShape:
    norms = [PlainShape(path, sizes.head_dim) for path in (HEAD_NORMS if head_norms else ())]
    return decoder(sizes, architecture, [(linears(PRE_NORM, sizes), norms)] * sizes.layers, biased)


def decoder(
    sizes: Sizes,
    architecture: str,
    blocks: Sequence[tuple[Mapping[str, tuple[int, int]], Sequence[PlainShape]]],
    biased: Collection[str] = (),
) -> ModelShape:
    """Return the shape of a decoder whose modules are named as in Llama.

    `blocks` has, for each block, the (out, in) of its linear modules and its other modules except `PRE_NORM`'s norms;
    `biased` has the linear modules with a bias. All paths are relative to the block.
    """
    d = sizes.hidden
    norms = [PlainShape(name, d) for name in PRE_NORM.norms]
    sites, others = embeddings(d, {"model.embed_tokens": sizes.vocab}), list[PlainShape]()
    for layer, (linear, parts) in enumerate(blocks):
        block = f"model.layers.{layer}"
        for path, features in linear.items():
            sites.append(SiteShape(f"{block}.{path}", "Linear", *features, bias=path in biased))
        others += [replace(part, path=f"{block}.{part.path}") for part in (*parts, *norms)]
    tied_to = "model.embed_tokens" if sizes.tied else None
    sites.append(SiteShape("lm_head", "Linear", sizes.vocab, d, dense=False, tied_to=tied_to))
    return shape_from(sizes, architecture, sites, [*others, PlainShape("model.norm", d)], gated=True)


def linears(block: Block, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return (out, in) for each linear module of a block, by its path in the block, in the order of the calls."""
    d, f = sizes.hidden, sizes.intermediate
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    inputs, inner = block.inputs
    output, down = block.outputs
    widths = (q, kv, kv) if len(inputs) == 3 else (q + 2 * kv,)
    modules = {path: (width, d) for path, width in zip(inputs, widths, strict=True)} | {output: (d, q)}
    return modules | dict.fromkeys(inner, (f, d)) | {down: (d, f)}


def embeddings(width: int, tables: Mapping[str, int]) -> list[SiteShape]:
    """Return embedding sites of a width, by a dict from path to number of embeddings."""
    return [SiteShape(path, "Embedding", width, rows, dense=False) for path, rows in tables.items()]


def _in_blocks(blocks: str, layout: Block, sizes: Sizes, kind: str = "Linear") -> list[SiteShape]:
    """Return the linear modules, all with a bias, of all blocks in the module list `blocks`."""
    return [
        SiteShape(f"{blocks}.{layer}.{name}", kind, *features, bias=True)
        for layer in range(sizes.layers)
        for name, features in linears(layout, sizes).items()
    ]


def shape_from(
    sizes: Sizes,
    architecture: str,
    sites: list[SiteShape],
    others: list[PlainShape],
    *,
    gated: bool = False,
    dropouts: dict[str, float] | None = None,
) -> ModelShape:
    """Return a shape from its sites and other modules; containers and the number of parameters follow from them."""
    owners = [s.path for s in sites] + [o.path for o in others]
    parents = {p.rsplit(".", n)[0] for p in owners for n in range(1, p.count(".") + 1)}
    return ModelShape(
        name=architecture,
        source="sizes",
        architecture=architecture,
        parameters=sum(s.parameters for s in sites) + sum(o.parameters for o in others),
        gated=gated,
        sites=tuple(sites),
        others=tuple(others),
        causal=architecture != "BertModel",
        dropouts=dropouts or {},
        containers=tuple(sorted(parents.difference(owners))),
        **{one.name: getattr(sizes, one.name) for one in fields(Sizes)},
    )


def config_value(config: Any, name: str) -> Any:
    """Return a value of a model's config, that of the first layer if layers differ; None if there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers does not give a value that differs between layers, as in Gemma 4
        return getattr(config.per_layer_config[0], name, None)


LISTS = ("layers", "layer", "h")
"""Names of the layer lists that `replicated` supports, as in Llama, BERT and Falcon."""


def replicated(shape: ModelShape, ranges: Sequence[tuple[int, int]] | None) -> ModelShape:
    """Return a model shape with replicated layers (`layer_replication`), which add sites but no weights.

    The layers of the half-open ranges follow each other; without ranges, the shape is returned unchanged. A ConfigError
    if the shape has no supported layer list, or a range is out of bounds.
    """
    if not ranges:
        return shape
    name, order = _list_and_order(shape, ranges)
    sites, plain = [], []
    for index, source in enumerate(order):
        again = source in order[:index]
        for site in shape.sites:
            if _layer(site.path, name) == source:
                first = _moved(site.path, name, order.index(source))
                tied_to = first if again else site.tied_to
                sites.append(replace(site, path=_moved(site.path, name, index), tied_to=tied_to))
        for other in shape.others:
            if _layer(other.path, name) == source:
                moved = replace(other, path=_moved(other.path, name, index))
                plain.append(replace(moved, parameters=0, biases=0) if again else moved)
    outside = [site for site in shape.sites if _layer(site.path, name) is None]
    before = next(i for i, site in enumerate(shape.sites) if _layer(site.path, name) is not None)
    return replace(
        shape,
        layers=len(order),
        sites=(*outside[:before], *sites, *outside[before:]),
        others=(*plain, *(other for other in shape.others if _layer(other.path, name) is None)),
    )


def _list_and_order(shape: ModelShape, ranges: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
    """Return the path of the layer list and, for each layer after replication, the index of its original layer."""
    lists: dict[str, set[int]] = {}
    for block in shape.blocks:
        path, _, number = block.rpartition(".")
        lists.setdefault(path, set()).add(int(number))
    name = next((path for path in lists if path.rpartition(".")[2] in LISTS), None)
    if name is None:
        text = f"layer_replication: {shape.name} has no layer list like that of Llama, BERT or Falcon."
        raise ConfigError(text, what=shape.name, field="layer_replication")
    count = len(lists[name])
    order: list[int] = []
    for start, end in ranges:
        if not 0 <= start < end <= count:
            message = f"layer_replication: ({start}, {end}) is out of bounds; {shape.name} has layers 0 to {count - 1}."
            raise ConfigError(message, what=(start, end), field="layer_replication")
        order += range(start, end)
    return name, order


def _layer(path: str, name: str) -> int | None:
    """Return the index of the layer that contains a module, or None if the module is outside the layer list."""
    block = block_of(path)
    return int(block.rpartition(".")[2]) if block is not None and block.rpartition(".")[0] == name else None


def _moved(path: str, name: str, index: int) -> str:
    rest = path.removeprefix(name + ".").partition(".")[2]
    return f"{name}.{index}.{rest}" if rest else f"{name}.{index}"
