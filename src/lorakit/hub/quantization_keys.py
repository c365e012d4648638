"""The keys of the quantization configs of files: which of them lorakit reads, and which cannot change a result.

Any other key or value is rejected: quantizers add keys that change what a model computes, such as rotations of the
input of each layer. The shapes, dtypes and names of the packed tensors come from the files. Activations of packed
weights are never quantized (docs/quantized.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ModelError

READ = "lorakit decodes the weights accordingly, or rejects the value"
TENSORS = "the names, shapes and values of the tensors in the files say the same"
MAKING = "it describes how the files were made"
COPIES = "it repeats the key without the underscore, and nothing reads it"
KERNELS = "it selects kernels, batch sizes or fusions of another library"
ACTIVATIONS = "activations are never quantized (docs/quantized.md)"
LIBRARY = "transformers, which loads these files, reads it"
"""Reasons why a key is accepted."""


@dataclass(frozen=True)
class Key:
    """A key that lorakit accepts, and why; `allowed` tests a value (None: all), `values` describes those allowed."""

    why: str
    allowed: Callable[[JsonValue], bool] | None = None
    values: str = ""


Keys = Mapping[str, Key]


def _keys(why: str, *names: str) -> dict[str, Key]:
    return dict.fromkeys(names, Key(why))


def _one_of(why: str, *values: JsonValue) -> Key:
    return Key(why, lambda value: value in values, ", ".join(map(repr, values)))


def _off(why: str) -> Key:
    return Key(why, lambda value: not value, "nothing")


def _is_dense(value: JsonValue) -> bool:
    return not value or (isinstance(value, dict) and value.get("format", "dense") == "dense")


def _has_no_groups(value: JsonValue) -> bool:
    return not value or (isinstance(value, dict) and set(value) == {"config_groups"} and not value["config_groups"])


def _only_skips(value: JsonValue) -> bool:
    return not value or (isinstance(value, dict) and all(str(name).startswith("-:") for name in value))


def _is_torchao_type(value: JsonValue) -> bool:
    kind = value.get("default") if isinstance(value, dict) and len(value) == 1 else None
    return isinstance(kind, dict) and str(kind.get("_type")).endswith("Config") and isinstance(kind.get("_data"), dict)


_LAYERS = ("modules_to_not_convert", "modules_not_quantized", "modules_in_block_to_quantize", "block_name_to_quantize")
_CALIBRATION = (
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse", "dataset"),
    *("tokenizer", "model_seqlen", "module_name_preceding_first_block", "pad_token_id", "model_name_or_path"),
    *("model_file_base_name", "cache_block_outputs", "meta"),
)
_LOADING = ("batch_size", "max_input_length", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16")
_GPTQ_BACKENDS = Key(KERNELS, lambda value: value not in ("llm-awq",), "not 'llm-awq', which packs weights differently")

_NO_FILES = Key(
    LIBRARY, lambda _: False, "no files of HQQ, only quantization='hqq4' or 'hqq8' of the unquantized model"
)

_INTEGERS: Keys = {
    **_keys(READ, "quant_method", "bits", "format"),
    **_keys(TENSORS, "group_size", "sym", "lm_head", *_LAYERS),
    **_keys(MAKING, *_CALIBRATION),
    **_keys(KERNELS, *_LOADING),
    "backend": _GPTQ_BACKENDS,
    "desc_act": Key(READ),
}
"""Keys of GPTQ and AWQ; transformers writes those of both for AWQ."""

FORMATS: Mapping[str, Keys] = {
    "gptq": {
        **_INTEGERS,
        "checkpoint_format": Key(READ),
        "is_marlin_format": _off(READ),
        "pack_dtype": _one_of(READ, "int32", "torch.int32", None),
        "dynamic": Key(READ, _only_skips, "layers that are left out, whose names begin with '-:'"),
    },
    "awq": {
        **_INTEGERS,
        **_keys(READ, "w_bit", "version"),
        **_keys(TENSORS, "q_group_size", "zero_point"),
        **_keys(KERNELS, "do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
    },
    "compressed-tensors": {
        **_keys(READ, "quant_method", "format", "config_groups"),
        **_keys(TENSORS, "quantization_status", "ignore"),
        **_keys(MAKING, "global_compression_ratio", "version"),
        **_keys(KERNELS, "run_compressed", "use_optimized_inference"),
        **_keys(LIBRARY, "dequantize"),
        **_keys(ACTIVATIONS, "kv_cache_scheme"),
        "sparsity_config": Key(READ, _is_dense, "the format 'dense'"),
        "transform_config": Key(READ, _has_no_groups, "no groups"),
        "moe_sparsity_config": _off(READ),
    },
    "fp8": {
        **_keys(READ, "quant_method"),
        **_keys(LIBRARY, "weight_block_size", "modules_to_not_convert", "ignored_layers", "modules_to_convert"),
        **_keys(LIBRARY, "dequantize", "scale_fmt", "expert_dtype"),
        **_keys(ACTIVATIONS, "activation_scheme", "kv_cache_scheme"),
        "fmt": _one_of(READ, "e4m3", None),
    },
    "mxfp4": {**_keys(READ, "quant_method"), **_keys(LIBRARY, "modules_to_not_convert", "dequantize")},
    "bitsandbytes": {
        **_keys(
            LIBRARY, "quant_method", "load_in_4bit", "load_in_8bit", "llm_int8_threshold", "bnb_4bit_compute_dtype"
        ),
        **_keys(LIBRARY, "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "bnb_4bit_quant_storage"),
        **_keys(COPIES, "_load_in_4bit", "_load_in_8bit"),
        **_keys(TENSORS, "bnb_4bit_use_double_quant"),
        "bnb_4bit_quant_type": _one_of(TENSORS, "nf4", "fp4", None),
        "llm_int8_has_fp16_weight": _off(LIBRARY),
    },
    "torchao": {
        **_keys(LIBRARY, "quant_method", "untie_embedding_weights"),
        **_keys(TENSORS, "modules_to_not_convert", "include_input_output_embeddings"),
        "quant_type": Key(TENSORS, _is_torchao_type, "{'default': a config of torchao, with its type and data}"),
        "quant_type_kwargs": _off(TENSORS),
    },
    "hqq": dict.fromkeys(("quant_method", "quant_config", "skip_modules"), _NO_FILES),
}
"""Quantization method of files -> the keys of its config that lorakit accepts."""

PARTS = frozenset(
    {"qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"}
    | {"absmax", "quant_map", "SCB", "W_q"}
)
"""Last names of tensors that only files with packed weights have."""

NEEDED: Mapping[str, tuple[str, ...]] = {"bitsandbytes": ("load_in_4bit", "load_in_8bit"), "torchao": ("quant_type",)}
"""Quantization method of files -> keys, one of which has a value; without it, packed values load as the weights."""

GROUP: Keys = {
    **_keys(READ, "weights", "format"),
    **_keys(TENSORS, "targets"),
    **_keys(ACTIVATIONS, "input_activations", "output_activations"),
}
"""Keys of one group of compressed-tensors."""

WEIGHTS: Keys = {
    **_keys(READ, "num_bits", "block_structure", "actorder", "symmetric"),
    **_keys(TENSORS, "type", "group_size", "scale_dtype", "zp_dtype"),
    **_keys(MAKING, "observer", "observer_kwargs"),
    "strategy": _one_of(READ, "tensor", "channel", "group", "block", None),
    "dynamic": _off(READ),
}
"""Keys of the weights of one group of compressed-tensors."""


def check_keys(values: JsonObject) -> None:
    """Check that lorakit supports every key of a config whose method is in `FORMATS`.

    Raises:
        ModelError: A key is unknown, or its value is not supported; or no key says what the files contain.
    """
    method = str(values.get("quant_method"))
    known = FORMATS.get(method)
    if known is None:
        return
    _check(values, known, method, "")
    needed = NEEDED.get(method, ())
    if needed and not any(values.get(name) for name in needed):
        raise unsupported(method, needed[-1], values.get(needed[-1]), " or ".join(f"a value of {n}" for n in needed))
    for path, group, weights in groups_of(values):
        _check(group, GROUP, method, f"{path}.")
        if weights is not None:
            _check(weights, WEIGHTS, method, f"{path}.weights.")


def check_described(unexpected: Iterable[str]) -> None:
    """Check the names of tensors that a model without a quantization config does not have.

    Raises:
        ModelError: They belong to packed weights, whose codes would be loaded as the weights.
    """
    packed = next((name for name in sorted(unexpected) if name.rpartition(".")[2] in PARTS), None)
    if packed is not None:
        text = (
            f"the files have packed weights ({packed}), but the config has no quantization_config that says how to "
            "decode them. Use the config.json that belongs to the files, or the unquantized model."
        )
        raise ModelError(text, what=packed, field="quantization_config")


def groups_of(values: JsonObject) -> Iterator[tuple[str, JsonObject, JsonObject | None]]:
    """Yield the path, the settings and the settings of the weights of each group of compressed-tensors.

    Raises:
        ModelError: A group is the name of a preset.
    """
    groups = values.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            raise unsupported("compressed-tensors", f"config_groups.{name}", group, "groups with all of their settings")
        weights = group.get("weights")
        yield f"config_groups.{name}", group, weights if isinstance(weights, dict) else None


def _check(values: JsonObject, known: Keys, method: str, prefix: str) -> None:
    for name, value in values.items():
        key = known.get(name)
        if key is None and value is not None:
            raise unsupported(method, prefix + name, value, f"the keys {', '.join(known)}")
        if key is not None and key.allowed is not None and not key.allowed(value):
            raise unsupported(method, prefix + name, value, key.values)


def unsupported(method: str, path: str, value: JsonValue, wanted: str) -> ModelError:
    """Return the error for a value of a quantization config, given its path there, and what lorakit supports."""
    text = (
        f"quantization_config: {method} {path} is {value!r}, which may change what the model computes; supported: "
        f"{wanted}. Use files with another quantization, or the unquantized model."
    )
    return ModelError(text, what=value, where=path, field=path.rpartition(".")[2], allowed=[wanted])
