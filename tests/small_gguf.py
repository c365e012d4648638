"""A small Llama as a GGUF file, written as llama.cpp's converter writes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.caches import GGUF
from lorakit.hub import converting

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def own_gguf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep converted models in the test's directory; import this fixture to use it."""
    monkeypatch.setattr(converting, "GGUF", dataclasses.replace(GGUF, place=str(tmp_path / "gguf-cache")))


def write_gguf(
    path: Path, model: Any, tokenizer: Any, form: str = "F16", *, arch: str = "llama", pre: str = "gpt-2", **extra: Any
) -> Path:
    """Write a Llama with its tokenizer (None for no tokenizer); matrices are stored in `form`, vectors in F32.

    Keyword arguments are additional entries of the metadata, with `__` in place of dots.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in extra.items():
        name = key.replace("__", ".")
        writer.add_uint16(name, value) if isinstance(value, int) else writer.add_string(name, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, pre)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = getattr(gguf.GGMLQuantizationType, form if tensor.ndim > 1 else "F32")
        data = gguf.quantize(_permuted(name, tensor, config).float().numpy(), kind)
        writer.add_tensor(_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any, pre: str) -> None:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(rules["vocab"], key=rules["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in rules["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, *rest, last = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.{last}"


def _permuted(name: str, tensor: Any, config: Any) -> Any:
    """Reorder the rows of queries and keys for llama.cpp's rotary embedding."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
