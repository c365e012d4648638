"""Small models with random weights of the architectures registered in transformers, from their default configs.

Sizes are replaced by field name, so a new architecture is covered without an entry here, or is skipped with its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

REGISTRIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
LARGEST = 14_000_000
"""Maximum parameters of a model."""

SIZES: dict[int, tuple[str, ...]] = {
    1: ("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups", "eos_token_id"),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
        *("decoder_layers", "num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_experts_per_tok"),
        *("top_k", "moe_topk", "moe_k", "linear_num_key_heads", "swa_num_key_value_heads", "index_n_heads"),
        *("type_vocab_size", "num_codebooks", "bos_token_id"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "prompt_length"),
        *("decoder_attention_heads", "swa_num_attention_heads", "linear_num_value_heads", "num_experts", "d_rel"),
        *("num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "time_step_rank"),
        *("conv_kernel",),
    ),
    8: (
        *("head_dim", "dim_head", "d_kv", "attention_head_size", "kv_channels", "swa_head_dim", "rotary_dim"),
        *("linear_key_head_dim", "linear_value_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        *("query_pre_attn_scalar", "sliding_window", "sliding_window_size", "attention_window", "block_size"),
        *("hidden_size_per_layer_input", "num_buckets", "mamba_d_state", "mamba_n_heads", "mamba_d_head"),
        *("mamba_num_heads", "mamba_head_dim", "state_size", "ssm_state_size"),
    ),
    16: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim"),
        *("index_topk", "rel_extent"),
    ),
    32: (
        *("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim"),
        *("word_embed_proj_dim", "d_embed", "lru_width"),
    ),
    48: (
        *("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", "dim_ff", "ffn_hidden_size", "encoder_ffn_dim"),
        *("decoder_ffn_dim", "prefix_dense_intermediate_size"),
    ),
    64: ("vocab_size", "vocab_size_per_layer_input"),
    128: ("max_position_embeddings", "n_positions", "n_ctx"),
}
OTHERS: tuple[dict[str, int], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"hidden_size": 64, "head_dim": 16},
    {"ffn_dim": 64},
)
"""Changes that are tried in turn until a model can be built and run."""


def architectures() -> Iterator[tuple[str, str]]:
    """Return the config type and class name of every registered language model."""
    for registry in REGISTRIES:
        for kind, names in getattr(modeling_auto, registry).items():
            for name in (names,) if isinstance(names, str) else names:
                yield kind, name


def small(kind: str, name: str) -> Any:
    """Return a small model of an architecture, frozen, in eval mode; raises the error of the last attempt."""
    failed: Exception | None = None
    for change in OTHERS:
        try:
            model = _built(kind, name, change)
            with torch.no_grad():
                model(**inputs(model, 9))
            return _built(kind, name, change)  # some models change themselves when they are called
        except Exception as error:  # noqa: BLE001
            failed = error
    assert failed is not None
    raise failed


def inputs(model: Any, tokens: int, rows: int = 2) -> dict[str, Any]:
    """Return token ids (rows, tokens) as the arguments of a call without a cache."""
    ids = torch.randint(3, 57, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return given | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})


def _built(kind: str, name: str, change: dict[str, int]) -> Any:
    sizes = {one: size for size, names in SIZES.items() for one in names} | change
    config = CONFIG_MAPPING[kind](**_smaller(CONFIG_MAPPING[kind]().to_dict(), sizes))
    made = getattr(transformers, name)
    if made.config_class is not None and not isinstance(config, made.config_class):
        config = config.get_text_config()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in made(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    return made(config).eval().requires_grad_(False)


def _smaller(settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    made: dict[str, Any] = {"pad_token_id": 0} if "pad_token_id" in settings else {}
    for key, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            made[key] = {"model_type": value["model_type"], **_smaller(value, sizes)}
        elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            made[key] = [kinds[target % len(kinds)] for target in range(max(2, len(kinds)))]
            made["num_hidden_layers"] = len(made[key])
        elif key == "head_dim" and "qk_rope_head_dim" in settings:
            continue  # derived from the others
        elif key in sizes and key not in made and (value is not None or key == "head_dim"):
            made[key] = sizes[key]
        elif key.endswith("_token_id") and isinstance(value, int) and value > 60:
            made[key] = 60
    return made
