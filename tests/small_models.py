"""Small models of common transformers families for tests of whole steps: random weights, no dropout, two layers.

Keyword arguments change the config; the caller seeds torch first.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
WIDER = GROUPED | {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
"""Sizes of a model whose linear layers in the blocks have sizes that are multiples of 32."""
ENCODER: dict[str, Any] = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def randomized(model: Any, std: float) -> Any:
    """Return a model for evaluation whose weights are so large that attention, and thus positions, matter."""
    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return model


def llama(**words: Any) -> Any:
    return _causal("Llama", GROUPED | words)


def mistral(**words: Any) -> Any:
    return _causal("Mistral", GROUPED | {"sliding_window": 4} | words)


def qwen2(**words: Any) -> Any:
    return _causal("Qwen2", GROUPED | words)


def qwen3(**words: Any) -> Any:
    return _causal("Qwen3", GROUPED | {"head_dim": 16} | words)


def gemma2(**words: Any) -> Any:
    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "attn_implementation": "eager"}
    return _causal("Gemma2", GROUPED | own | words)


def gemma3(**words: Any) -> Any:
    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "pad_token_id": 0}
    config = transformers.Gemma3TextConfig(**(GROUPED | own | words))
    return transformers.Gemma3ForCausalLM(config)


def olmo2(**words: Any) -> Any:
    return _causal("Olmo2", GROUPED | words)


def phi3(**words: Any) -> Any:
    return _causal("Phi3", GROUPED | {"pad_token_id": 0} | words)


def mixtral(**words: Any) -> Any:
    return _causal("Mixtral", GROUPED | {"num_local_experts": 2} | words)


def neox(**words: Any) -> Any:
    return _causal("GPTNeoX", SMALL | words)


def gpt2(**words: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **none, **words}))


def opt(**words: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return _causal("OPT", sizes | {"num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0} | words)


def bert(**words: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**(ENCODER | words)))


def t5(**words: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    none = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**sizes, **none, **words}))


def _causal(family: str, words: dict[str, Any]) -> Any:
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**words))
