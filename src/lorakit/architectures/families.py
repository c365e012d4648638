"""The table of architectures: layouts of blocks, classes that have them, and default target modules.

`lorakit.speed`, `lorakit.plan`, `lorakit.core` and `lorakit.peft` read it. A new architecture is one row; the tests in
`tests/architectures/test_families.py` run for each model of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorakit.architectures.layouts import (
    Architecture,
    AttentionLayout,
    Block,
    ExpertsLayout,
    FeedForwardLayout,
    Sublayer,
)

QKV = ("q_proj", "k_proj", "v_proj")
SEPARATE = AttentionLayout(QKV, "o_proj")
GATED = FeedForwardLayout(("gate_proj", "up_proj"), "down_proj", is_gated=True, saved=3)

PRE_NORM = Block(Sublayer("input_layernorm", "self_attn"), Sublayer("post_attention_layernorm", "mlp"), SEPARATE, GATED)
"""Llama's block."""

FOUR_NORMS = Block(
    Sublayer("input_layernorm", "self_attn", "post_attention_layernorm"),
    Sublayer("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    SEPARATE,
    GATED,
)
"""Gemma's block since Gemma 2."""

GPT2_BLOCK = Block(
    Sublayer("ln_1", "attn"),
    Sublayer("ln_2", "mlp"),
    AttentionLayout(("c_attn",), "c_proj", weights_dropout="attn_dropout", output_dropout="resid_dropout"),
    FeedForwardLayout(("c_fc",), "c_proj", output_dropout="dropout", saved=4),
    norm="layer",
)

BERT_BLOCK = Block(
    Sublayer("", "attention", dropout="attention.output.dropout", last="attention.output.LayerNorm"),
    Sublayer("", "", dropout="output.dropout", last="output.LayerNorm"),
    AttentionLayout(
        ("self.query", "self.key", "self.value"), "output.dense", weights_dropout="self.dropout", settings="self"
    ),
    FeedForwardLayout(("intermediate.dense",), "output.dense", ("intermediate.intermediate_act_fn",), saved=1),
    norm="layer",
)


def _with_heads(*names: str, head: str = "ForCausalLM") -> tuple[str, ...]:
    """Return the names of the classes for language modeling and for classification of each model."""
    heads = (head, "ForSequenceClassification", "ForTokenClassification")
    return tuple(f"{name}{one}" for name in names for one in heads)


LLAMA = Architecture(
    "llama",
    "Llama-like block (RMSNorm, rotary, SwiGLU, sdpa)",
    (*_with_heads("Llama", "Qwen2", "Qwen3", "Mistral", "Ministral", "Gemma", "SmolLM3"), "CwmForCausalLM"),
    PRE_NORM,
    is_planned=True,
    model_types=("gemma", "llama", "mistral", "qwen2", "qwen3"),
    targets=("q_proj", "v_proj"),
)
GEMMA3 = Architecture(
    "gemma3",
    "Gemma-3-like block (four RMSNorms, rotary, gated tanh-GELU, sdpa)",
    ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    FOUR_NORMS,
    is_planned=True,
    model_types=("gemma3_text",),
    targets=("q_proj", "v_proj"),
)
GPT2 = Architecture(
    "gpt2",
    "GPT-2-like block (LayerNorm, tanh-GELU, dropout)",
    ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    GPT2_BLOCK,
    is_planned=True,
    model_types=("gpt2",),
    targets=("c_attn",),
)
BERT = Architecture(
    "bert",
    "BERT-like block (LayerNorm, GELU, dropout)",
    (
        *("BertModel", "BertLMHeadModel"),
        *_with_heads("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie", "RoCBert", head="ForMaskedLM"),
    ),
    BERT_BLOCK,
    is_planned=True,
    model_types=("bert", "electra", "roberta", "xlm-roberta"),
    targets=("query", "value"),
)

T5_BLOCK = Block(
    Sublayer("layer_norm", "SelfAttention", dropout="dropout"),
    Sublayer("layer_norm", "DenseReluDense", dropout="dropout"),
    AttentionLayout(("q", "k", "v"), "o"),
    FeedForwardLayout(("wi",), "wo", inner_dropout="dropout"),
    is_split=True,
)
_MT5_GATED = FeedForwardLayout(("wi_0", "wi_1"), "wo", inner_dropout="dropout", is_gated=True, saved=3)

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    GEMMA3,
    GPT2,
    BERT,
    Architecture(
        "gemma2",
        models=_with_heads("Gemma2")[:2],
        block=FOUR_NORMS,
        model_types=("gemma2",),
        targets=("q_proj", "v_proj"),
    ),
    Architecture(
        "olmo2",
        models=_with_heads("Olmo2")[:2],
        block=Block(
            Sublayer("", "self_attn", "post_attention_layernorm"),
            Sublayer("", "mlp", "post_feedforward_layernorm"),
            SEPARATE,
            GATED,
        ),
    ),
    Architecture(
        "phi3",
        models=_with_heads("Phi3"),
        block=Block(
            Sublayer("input_layernorm", "self_attn", dropout="resid_attn_dropout"),
            Sublayer("post_attention_layernorm", "mlp", dropout="resid_mlp_dropout"),
            AttentionLayout(("qkv_proj",), "o_proj"),
            FeedForwardLayout(("gate_up_proj",), "down_proj", is_gated=True, saved=3),
        ),
    ),
    Architecture(
        "experts",
        models=("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"),
        block=replace(PRE_NORM, feed_forward_modules=None),
        model_types=("mixtral",),
        targets=("q_proj", "v_proj"),
    ),
    Architecture(
        "gpt_oss",
        models=("GptOssForCausalLM", "GptOssForSequenceClassification", "GptOssForTokenClassification"),
        block=replace(
            PRE_NORM,
            attention_modules=AttentionLayout(QKV, "o_proj", has_half_tables=True, sinks="sinks"),
            feed_forward_modules=None,
        ),
    ),
    Architecture(
        "modernbert",
        models=_with_heads("ModernBert", head="ForMaskedLM"),
        block=Block(
            Sublayer("attn_norm", "attn"),
            Sublayer("mlp_norm", "mlp"),
            AttentionLayout(("Wqkv",), "Wo", output_dropout="out_drop"),
            FeedForwardLayout(("Wi",), "Wo", ("act",), inner_dropout="drop", is_gated=True, saved=3),
            norm="layer",
        ),
    ),
    Architecture(
        "gpt_neox",
        models=("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
        block=Block(
            Sublayer("input_layernorm", "attention", dropout="post_attention_dropout"),
            Sublayer("post_attention_layernorm", "mlp", dropout="post_mlp_dropout"),
            AttentionLayout(("query_key_value",), "dense", is_interleaved=True),
            FeedForwardLayout(("dense_h_to_4h",), "dense_4h_to_h"),
            norm="layer",
        ),
        model_types=("gpt_neox",),
        targets=("query_key_value",),
    ),
    Architecture(
        "opt",
        models=("OPTForCausalLM", "OPTForSequenceClassification"),
        block=Block(
            Sublayer("self_attn_layer_norm", "self_attn", dropout_p="dropout"),
            Sublayer("final_layer_norm", "", dropout_p="dropout"),
            AttentionLayout(QKV, "out_proj"),
            FeedForwardLayout(("fc1",), "fc2", ("activation_fn",)),
            norm="layer",
        ),
        model_types=("opt",),
        targets=("q_proj", "v_proj"),
    ),
    Architecture(
        "distilbert",
        models=("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
        block=Block(
            Sublayer("", "attention", last="sa_layer_norm"),
            Sublayer("", "ffn", dropout="ffn.dropout", last="output_layer_norm"),
            AttentionLayout(("q_lin", "k_lin", "v_lin"), "out_lin", weights_dropout="dropout"),
            FeedForwardLayout(("lin1",), "lin2", ("activation",)),
            norm="layer",
        ),
    ),
    Architecture("t5", models=("T5ForConditionalGeneration",), block=T5_BLOCK, model_types=("t5",), targets=("q", "v")),
    Architecture(
        "mt5",
        models=("MT5ForConditionalGeneration",),
        block=replace(T5_BLOCK, feed_forward_modules=_MT5_GATED),
        model_types=("mt5",),
        targets=("q", "v"),
    ),
    *(
        Architecture(model_types[0], model_types=model_types, targets=targets)
        for model_types, targets in (
            (("bart", "gpt_neo", "gptj", "llama4", "stablelm"), ("q_proj", "v_proj")),
            (("bloom", "RefinedWeb", "RefinedWebModel", "chatglm", "falcon"), ("query_key_value",)),
            (("blip-2",), ("q", "v", "q_proj", "v_proj")),
            (("btlm",), ("c_proj", "c_attn")),
            (("codegen",), ("qkv_proj",)),
            (("deberta",), ("in_proj",)),
            (("deberta-v2",), ("query_proj", "value_proj")),
            (("gemma4",), r".*language_model\..*\.(q_proj|v_proj)"),
            (("gpt_bigcode",), ("c_attn",)),
            (("layoutlm",), ("query", "value")),
            (("mpt",), ("Wqkv",)),
            (("nemotron_h",), ("q_proj", "k_proj", "v_proj", "o_proj")),
            (("phi",), ("q_proj", "v_proj", "fc1", "fc2")),
            (("rwkv",), ("key", "value", "receptance", "output")),
            (("rwkv7",), ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")),
        )
    ),
)
"""The table: rows with blocks, then rows with default targets only."""

DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    model_type: row.targets for row in ARCHITECTURES for model_type in row.model_types
}
"""Default target modules for each `model_type`, as in PEFT."""

EXPERTS: tuple[ExpertsLayout, ...] = (
    ExpertsLayout(("w1", "w3"), "w2", block="block_sparse_moe", model_types=("minimax", "minimax_m2", "mixtral")),
    ExpertsLayout(
        ("gate_proj", "up_proj"),
        "down_proj",
        model_types=(
            *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
            *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
            *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
            *("qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"),
        ),
    ),
)
"""Names of transformers 4 in models with experts."""

EXPERTS_BY_TYPE: Mapping[str, ExpertsLayout] = {kind: layout for layout in EXPERTS for kind in layout.model_types}
"""The names of transformers 4 for each `model_type`."""

OLD_EXPERTS_BY_TYPE: Mapping[str, ExpertsLayout] = {
    **EXPERTS_BY_TYPE,
    "phimoe": replace(EXPERTS_BY_TYPE["mixtral"], current_router="router"),
    "qwen2_moe": EXPERTS_BY_TYPE["qwen3_moe"],
}
"""The names in adapters made under transformers 4, also for types for which PEFT converts no names."""

TUPLE_ROUTERS = (
    "transformers.models.llama4.modeling_llama4.Llama4Router",
    "transformers.models.phimoe.modeling_phimoe.PhimoeTopKRouter",
)
"""Subclasses of nn.Linear that return a tuple, to which the product of A and B cannot be added."""

TUPLE_ROUTER_BY_TYPE: Mapping[str, str] = dict.fromkeys(("llama4", "llama4_text", "phimoe"), "router")
"""`model_type` -> name of the modules of these classes, whose weights are adapted as parameters."""

_DEPENDS_ON_PADDING: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("canine", "convbert", "cpmant", "fnet", "funnel", "mobilebert", "nystromformer"), ()),
    **dict.fromkeys(("prophetnet", "reformer", "yoso"), ()),
    **dict.fromkeys(("t5gemma", "t5gemma2", "xlnet"), ("classification",)),
}
"""Model types whose outputs for a row depend on the padding after it -> heads that do so; empty for all heads.

In rows longer than `index_topk`, sparse attention (`deepseek_v32`, `glm_moe_dsa`, ...) breaks ties between tokens of
equal score by the length of the batch, also without padding; these models are not listed.
"""


def depends_on_padding(model_type: str, head: str) -> bool:
    """Return whether a model's outputs for a row depend on the padding after it, with a key of `lorakit.hub.TASKS`."""
    heads = _DEPENDS_ON_PADDING.get(model_type)
    return heads is not None and (not heads or head in heads)


BLOCKS: tuple[Block, ...] = tuple(dict.fromkeys(row.block for row in ARCHITECTURES if row.block is not None))
"""The different layouts of blocks."""

ATTENTION: tuple[AttentionLayout, ...] = tuple(
    dict.fromkeys(block.attention_modules for block in BLOCKS if not (block.is_split or block.is_post_norm))
)
"""The different layouts of attention modules that are fused alone, too."""

FEED_FORWARD: tuple[FeedForwardLayout, ...] = (
    *dict.fromkeys(
        block.feed_forward_modules
        for block in BLOCKS
        if block.feed_forward_modules is not None and not block.is_post_norm
    ),
    replace(GATED, inner_dropout="dropout"),  # T5Gemma, GTE
    FeedForwardLayout(("fc1",), "fc2"),  # Phi
    FeedForwardLayout(("fc1",), "fc2", inner_dropout="dropout"),  # SeamlessM4T, NLLB-MoE
)
"""The different layouts of feed-forward blocks that are fused alone, too; some belong to layers that are not fused."""


_BY_MODEL: Mapping[str, Architecture] = {model: row for row in ARCHITECTURES for model in row.models}


def architecture_of(model: str) -> Architecture | None:
    """Return the row of a class in transformers, such as "LlamaForCausalLM", or None if the table has no such class."""
    return _BY_MODEL.get(model)
