"""Small models with random weights of the architectures registered in transformers, from their default configs.

Sizes are replaced by field name, so a new architecture is covered without an entry here, or is skipped with its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

REGISTRIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)
CLASSIFIER = "ForSequenceClassification"
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
        *("mamba_num_heads", "mamba_head_dim", "state_size", "ssm_state_size", "chunk_size", "mamba_chunk_size"),
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
    64: (
        *("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "pronunciation_vocab_size"),
        *("shape_vocab_size", "src_vocab_size", "tgt_vocab_size"),
    ),
    128: ("max_position_embeddings", "n_positions", "n_ctx"),
}
OTHERS: tuple[dict[str, int], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"hidden_size": 64, "head_dim": 16},
    {"ffn_dim": 64},
    {"num_hidden_layers": 6},
)
"""Changes that are tried in turn until a model can be built and run."""

LATENT = {"head_dim": 8, "num_key_value_heads": 4}
LINEAR = {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2, "num_expert_group": 1}
HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OF_KIND: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LATENT | LINEAR,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0], "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "kimi_linear": LATENT | LINEAR,
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "feed_forward_size": 48}
    | {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2, "hash_seed": 0},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, "num_hidden_layers": len(HYBRID), "num_key_value_heads": 4}
    | {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {"layers_block_type": HYBRID, "num_hidden_layers": len(HYBRID), "num_key_value_heads": 4}
    | {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Values that the config of one type needs."""


class NotBuilt(Exception):
    """No small model of an architecture can be built and run; the message is that of the last attempt."""


class Architecture(NamedTuple):
    """A config type, such as "llama", and a class name, such as "LlamaForCausalLM"."""

    kind: str
    name: str


def architectures() -> Iterator[Architecture]:
    """Return every registered language model once per class."""
    found = dict[str, str]()
    for registry in REGISTRIES:
        for kind, names in getattr(modeling_auto, registry).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return (Architecture(kind, name) for name, kind in found.items())


def small(kind: str, name: str) -> Any:
    """Return a small model of an architecture, frozen, in eval mode; raises NotBuilt."""
    return build(kind, name, small_settings(kind, name))


def small_settings(kind: str, name: str) -> dict[str, Any]:
    """Return config values with which a small model can be built and run, without dropout; raises NotBuilt."""
    failed = ""
    try:
        defaults = CONFIG_MAPPING[kind]().to_dict()
    except Exception as error:
        raise NotBuilt(f"{name}: its config has no defaults: {type(error).__name__}") from error
    for change in OTHERS:
        sizes = {one: size for size, names in SIZES.items() for one in names} | change
        settings = _smaller(defaults, sizes) | OF_KIND.get(kind, {})
        try:
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in build(kind, name, settings).parameters())
            if count > LARGEST:
                raise ValueError(f"{count} parameters")
            model = build(kind, name, settings)
            with torch.no_grad():
                model(**inputs(model, 9))
            return settings
        except Exception as error:  # noqa: BLE001
            failed = f"{name}: {type(error).__name__}: {error}"
    raise NotBuilt(failed)


def inputs(model: Any, tokens: int, rows: int = 2) -> dict[str, Any]:
    """Return token ids (rows, tokens) as the arguments of a call without a cache."""
    ids = torch.randint(3, 57, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder and CLASSIFIER in type(model).__name__:
        ids[:, -1] = model.config.eos_token_id  # these models read the output at the end token
    elif model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return given | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})


def build(kind: str, name: str, settings: dict[str, Any]) -> Any:
    """Return the frozen model of a config with these values, in eval mode."""
    config = CONFIG_MAPPING[kind](**settings)
    made = getattr(transformers, name)
    if made.config_class is not None and not isinstance(config, made.config_class):
        config = config.get_text_config()
    torch.manual_seed(0)
    return made(config).eval().requires_grad_(False)


def _smaller(settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    made: dict[str, Any] = {"pad_token_id": 0} if "pad_token_id" in settings else {}
    for key, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            kind = value["model_type"]
            made[key] = {"model_type": kind, **_smaller(value, sizes), **OF_KIND.get(kind, {})}
        elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            made[key] = [kinds[target % len(kinds)] for target in range(max(2, len(kinds)))]
            made["num_hidden_layers"] = len(made[key])
        elif key == "head_dim" and "qk_rope_head_dim" in settings:
            continue  # derived from the others
        elif "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
            made[key] = type(value)(0)
        elif key in sizes and key not in made and (value is not None or key == "head_dim"):
            made[key] = sizes[key]
        elif key.endswith("_token_id") and isinstance(value, int) and value > 60:
            made[key] = 60
    return made
