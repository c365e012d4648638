"""`RUNTIMES`: the rules of each runtime, which say what it does if a condition holds, and how that is known.

A source is a file of the runtime, below its package or repository, with the function, or an issue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Effect(Enum):
    """Effect of a condition in a runtime; the last two change answers without an error."""

    FINE = "fine"
    UNCHECKED = "not checked"
    REJECTED = "rejected"
    IGNORED = "ignored silently"
    WRONG = "wrong result"


FINE, UNCHECKED, REJECTED, IGNORED, WRONG = Effect
RUN, SOURCE, THREAD = "run", "source", "thread"
"""Evidence for an effect: it was observed, read in the source, or reported in an issue."""


@dataclass(frozen=True)
class Rule:
    """Effect of one condition in one runtime.

    Attributes:
        source: Where it is defined: a file and function of the runtime, or an issue.
        known: "run", "source" or "thread".
        remedy: Name of an entry of `REMEDIES`, or "" for none.
    """

    effect: Effect
    source: str
    known: str = SOURCE
    remedy: str = ""


@dataclass(frozen=True)
class Runtime:
    """A program that answers with adapters.

    Attributes:
        version: The version that the rules are about.
        rules: Name of a condition -> what the runtime does; a condition without a rule does not concern it.
    """

    version: str
    rules: Mapping[str, Rule]


REMEDIES: Mapping[str, str] = {
    "export": "lorakit export {format} {adapter}{served} --output-dir OUTPUT",
    "gguf": "lorakit export gguf {adapter}{model} --output-dir OUTPUT",
    "merged": "lorakit merge{model} --adapter {adapter} --output-dir OUTPUT, and convert the merged model to GGUF",
    "merged gguf": "lorakit export gguf {adapter}{model} --merged --base-gguf BASE.gguf --output-dir OUTPUT",
    "mlx": "lorakit export mlx {adapter}{model} --output-dir OUTPUT",
    "served base": "lorakit export {format} {adapter} --served-base MODEL --output-dir OUTPUT",
    "merge": "lorakit merge{model} --adapter {adapter} --output-dir OUTPUT, and serve the merged model",
    "untie": "lorakit merge{model} --adapter {adapter} --untie --output-dir OUTPUT, and serve the merged model",
    "resize and merge": "if the adapter was trained on a resized base, save that (model.resize_token_embeddings), "
    "and merge: lorakit merge --model BASE --adapter {adapter} --output-dir OUTPUT",
    "groups": "if PEFT made the adapter on a base that GPTQ did not quantize, set use_qalora to false in "
    "adapter_config.json; else lorakit export {format} {adapter}{served} --output-dir OUTPUT",
    "layer biases": "merge the adapter (lorakit merge) if its layers have biases, else train it without lora_bias",
    "plain": "merge the adapter and extract a plain one: lorakit merge, then lorakit extract --rank",
    "rank": "start the runtime with --max-lora-rank {limit}, or reduce the rank: lorakit compress --rank",
    "targets": "name the modules in target_modules of adapter_config.json",
    "prefix": "rename the tensors so that they start with base_model.model.",
    "retrain": "use an earlier checkpoint, or train the adapter again",
    "base": "serve the base that the adapter was trained on",
    "template": "pass the adapter's template: --chat-template {template}",
    "theta": "add rope_theta to the base's config.json at the top level, or save the base with lorakit, which adds it",
    "resize": "resize the base first: model.resize_token_embeddings",
}
"""Name -> what to do, with the adapter, its chat template, the format of `lorakit export`, the limit of the rank, and
the flags for the base, if the adapter does not name it."""

_VLLM_HELPER = "vllm/lora/peft_helper.py: "
_VLLM_MODEL = "vllm/lora/lora_model.py: "
_VLLM_NAMES = "vllm/lora/utils.py: parse_fine_tuned_lora_name"
_NOT_RESOLVED_BY_VLLM = Rule(
    REJECTED, "vllm/plugins/lora_resolvers/filesystem_resolver.py; --lora-modules compares no name", RUN, "served base"
)
_SILENT_IN_VLLM = Rule(IGNORED, "vllm/lora/model_manager.py: activate_adapter; vllm#34186, vllm#48019", RUN, "base")

VLLM: Mapping[str, Rule] = {
    "rank": Rule(REJECTED, _VLLM_HELPER + "validate_legal", RUN, "rank"),
    "rank value": Rule(REJECTED, "vllm/config/lora.py: MaxLoRARanks", SOURCE, "rank"),
    "rslora": Rule(FINE, _VLLM_HELPER + "_scaling", RUN),
    "rank pattern": Rule(FINE, _VLLM_HELPER + "get_rank_and_scaling", RUN),
    "alpha pattern": Rule(FINE, _VLLM_HELPER + "get_rank_and_scaling", RUN),
    "dora": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "plain"),
    "kasa": Rule(REJECTED, _VLLM_NAMES, RUN, "plain"),
    "lora bias": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "layer biases"),
    "bias": Rule(REJECTED, _VLLM_HELPER + "validate_legal", RUN, "merge"),
    "saved module": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "merge"),
    "classification head": Rule(FINE, _VLLM_HELPER + "_validate_features"),
    "token rows": Rule(REJECTED, _VLLM_NAMES, RUN, "merge"),
    "new tokens": Rule(IGNORED, "vllm/renderers/hf.py: the tokenizer is the base's", SOURCE, "resize and merge"),
    "resized embedding": Rule(REJECTED, _VLLM_MODEL + "from_lora_tensors", RUN, "resize and merge"),
    "alora": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "gguf"),
    "init": Rule(REJECTED, _VLLM_HELPER + "_init_is_supported", RUN, "plain"),
    "bd-lora": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "export"),
    "qa-lora": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "groups"),
    "grouped inputs": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "export"),
    "lora-xs": Rule(REJECTED, _VLLM_NAMES, RUN, "export"),
    "extra tensors": Rule(REJECTED, _VLLM_NAMES, RUN, "export"),
    "layer replication": Rule(REJECTED, _VLLM_HELPER + "_validate_features", RUN, "untie"),
    "experts": Rule(UNCHECKED, "vllm/lora/model_manager.py: _validate_moe_lora_format"),
    "target expression": Rule(FINE, _VLLM_MODEL + "from_local_checkpoint reads the tensors' names", RUN),
    "part of attention": Rule(FINE, "vllm/lora/model_manager.py: _create_merged_loras_inplace", RUN),
    "incomplete site": Rule(WRONG, "vllm/lora/layers/column_parallel_linear.py: set_lora", RUN, "retrain"),
    "unselected": Rule(FINE, _VLLM_MODEL + "from_local_checkpoint reads the tensors' names"),
    "prefix": Rule(FINE, _VLLM_NAMES),
    "nan": Rule(WRONG, _VLLM_MODEL + "from_lora_tensors; then other adapters fail, too", RUN, "retrain"),
    "scale 0": Rule(IGNORED, _VLLM_HELPER + "_scaling", RUN, "retrain"),
    "zero update": Rule(IGNORED, _VLLM_MODEL + "from_lora_tensors", RUN, "retrain"),
    "no base name": _NOT_RESOLVED_BY_VLLM,
    "base name": _NOT_RESOLVED_BY_VLLM,
    "other base": Rule(WRONG, "vllm/lora/worker_manager.py: _load_adapter compares no base", RUN, "base"),
    "unknown name": Rule(REJECTED, _VLLM_MODEL + "check_unexpected_modules", RUN, "base"),
    "language model": _SILENT_IN_VLLM,
    "unknown path": _SILENT_IN_VLLM,
    "shape": Rule(WRONG, "vllm/lora/layers/base_linear.py: set_lora copies smaller factors", RUN, "base"),
    "missing sites": Rule(WRONG, "vllm/lora/model_manager.py: activate_adapter", RUN, "retrain"),
    "quantized base": Rule(UNCHECKED, "vllm/lora/layers"),
    "architecture": Rule(REJECTED, "vllm/model_executor/models/interfaces.py: supports_lora", SOURCE, "merge"),
    "tied head": Rule(FINE, "vllm/lora/layers/logits_processor.py", RUN),
    "tied embedding": Rule(FINE, "vllm/lora/layers/vocab_parallel_embedding.py", RUN),
    "tokenizer": Rule(IGNORED, "vllm/renderers/hf.py: the tokenizer is the base's", SOURCE, "merge"),
    "chat template": Rule(IGNORED, "vllm/renderers/hf.py: resolve_chat_template", RUN, "template"),
}

_SGLANG_ADAPTER, _SGLANG_POOL = "sglang/srt/lora/lora.py: ", "sglang/srt/lora/mem_pool.py: "
_SGLANG_CHECK = "sglang/srt/lora/lora_manager.py: validate_new_adapter"
_SGLANG_LOAD = _SGLANG_POOL + "load_lora_weight_to_buffer"

SGLANG: Mapping[str, Rule] = {
    "rank": Rule(REJECTED, _SGLANG_POOL + "can_support", SOURCE, "rank"),
    "rslora": Rule(IGNORED, _SGLANG_ADAPTER + "LoRAAdapter.__init__; sglang#40835", SOURCE, "export"),
    "rank pattern": Rule(
        REJECTED, _SGLANG_ADAPTER + "normalize_qkv_proj; mem_pool.py asserts r rows", SOURCE, "export"
    ),
    "alpha pattern": Rule(IGNORED, _SGLANG_ADAPTER + "LoRAAdapter.__init__", SOURCE, "export"),
    "dora": Rule(REJECTED, _SGLANG_CHECK, SOURCE, "plain"),
    "kasa": Rule(REJECTED, _SGLANG_LOAD, SOURCE, "plain"),
    "lora bias": Rule(IGNORED, _SGLANG_LOAD, SOURCE, "layer biases"),
    "bias": Rule(IGNORED, _SGLANG_LOAD, SOURCE, "merge"),
    "saved module": Rule(IGNORED, _SGLANG_ADAPTER + "_process_weight", SOURCE, "merge"),
    "classification head": Rule(IGNORED, _SGLANG_ADAPTER + "_process_weight", SOURCE, "merge"),
    "token rows": Rule(IGNORED, _SGLANG_ADAPTER + "_process_weight", SOURCE, "merge"),
    "new tokens": Rule(REJECTED, _SGLANG_CHECK, SOURCE, "resize and merge"),
    "resized embedding": Rule(REJECTED, _SGLANG_LOAD, SOURCE, "resize and merge"),
    "alora": Rule(WRONG, "sglang/srt/lora/lora_config.py: the adapter is active everywhere", SOURCE, "gguf"),
    "init": Rule(WRONG, "sglang/srt/lora/lora_config.py: LoRAConfig.__init__", SOURCE, "plain"),
    "bd-lora": Rule(REJECTED, _SGLANG_LOAD, SOURCE, "export"),
    "qa-lora": Rule(FINE, "sglang/srt/lora/lora_config.py: not read"),
    "grouped inputs": Rule(REJECTED, _SGLANG_LOAD, SOURCE, "export"),
    "lora-xs": Rule(REJECTED, _SGLANG_ADAPTER + "LoRAAdapter.__init__", SOURCE, "export"),
    "extra tensors": Rule(REJECTED, _SGLANG_LOAD + " takes them for B", SOURCE, "export"),
    "layer replication": Rule(REJECTED, _SGLANG_ADAPTER + "_process_weight", SOURCE, "untie"),
    "experts": Rule(UNCHECKED, _SGLANG_LOAD),
    "target expression": Rule(REJECTED, "sglang/srt/lora/utils.py: get_normalized_target_modules", SOURCE, "export"),
    "part of attention": Rule(REJECTED, _SGLANG_ADAPTER + "normalize_qkv_proj", SOURCE, "merge"),
    "incomplete site": Rule(WRONG, _SGLANG_LOAD, SOURCE, "retrain"),
    "unselected": Rule(UNCHECKED, "sglang/srt/lora/utils.py: get_normalized_target_modules"),
    "prefix": Rule(UNCHECKED, _SGLANG_ADAPTER + "_process_weight"),
    "nan": Rule(WRONG, _SGLANG_LOAD + " checks no values", SOURCE, "retrain"),
    "scale 0": Rule(IGNORED, _SGLANG_ADAPTER + "LoRAAdapter.__init__", SOURCE, "retrain"),
    "zero update": Rule(IGNORED, _SGLANG_LOAD, SOURCE, "retrain"),
    "no base name": Rule(FINE, "sglang/srt/lora/lora_config.py: not read"),
    "base name": Rule(FINE, "sglang/srt/lora/lora_config.py: not read"),
    "other base": Rule(WRONG, "sglang/srt/lora/lora_manager.py: compares no base", SOURCE, "base"),
    "unknown name": Rule(REJECTED, _SGLANG_POOL + "can_support", SOURCE, "base"),
    "language model": Rule(FINE, _SGLANG_ADAPTER + "_process_weight finds layers by number"),
    "unknown path": Rule(UNCHECKED, _SGLANG_ADAPTER + "_process_weight finds layers by number"),
    "shape": Rule(REJECTED, _SGLANG_LOAD, SOURCE, "base"),
    "missing sites": Rule(WRONG, _SGLANG_LOAD, SOURCE, "retrain"),
    "quantized base": Rule(UNCHECKED, "sglang/srt/lora/layers.py"),
    "tied head": Rule(UNCHECKED, "sglang/srt/lora/layers.py"),
    "tied embedding": Rule(UNCHECKED, "sglang/srt/lora/layers.py"),
    "tokenizer": Rule(UNCHECKED, "sglang/srt/managers/tokenizer_manager.py"),
    "chat template": Rule(IGNORED, "sglang/srt/parser/template_manager.py", SOURCE, "template"),
}

_CONVERTER, _LLAMA_LOADER = "convert_lora_to_gguf.py: ", "src/llama-adapter.cpp: llama_adapter_lora_init_impl"
_LLAMA_SCALE = "src/llama-adapter.h: get_scale"
_NOT_A_FACTOR = Rule(REJECTED, _CONVERTER + "get_tensors", SOURCE, "merged")

LLAMA_CPP: Mapping[str, Rule] = {
    "rank": Rule(FINE, _LLAMA_SCALE),
    "rslora": Rule(IGNORED, _CONVERTER + "set_gguf_parameters; " + _LLAMA_SCALE, SOURCE, "gguf"),
    "rank pattern": Rule(FINE, _LLAMA_SCALE + " takes the rank from the tensor", RUN),
    "alpha pattern": Rule(IGNORED, _CONVERTER + "set_gguf_parameters", SOURCE, "gguf"),
    "dora": _NOT_A_FACTOR,
    "kasa": _NOT_A_FACTOR,
    "lora bias": Rule(REJECTED, _CONVERTER + "get_tensors", SOURCE, "layer biases"),
    "bias": _NOT_A_FACTOR,
    "saved module": _NOT_A_FACTOR,
    "classification head": _NOT_A_FACTOR,
    "token rows": _NOT_A_FACTOR,
    "new tokens": Rule(IGNORED, _CONVERTER + "set_vocab", SOURCE, "resize and merge"),
    "resized embedding": Rule(REJECTED, _LLAMA_LOADER, SOURCE, "resize and merge"),
    "alora": Rule(FINE, _CONVERTER + "set_gguf_parameters"),
    "init": Rule(WRONG, _CONVERTER + "init_lora_weights is not read", SOURCE, "plain"),
    "bd-lora": Rule(REJECTED, _LLAMA_LOADER, SOURCE, "gguf"),
    "qa-lora": Rule(FINE, _CONVERTER + "not read"),
    "grouped inputs": Rule(REJECTED, _LLAMA_LOADER, SOURCE, "gguf"),
    "lora-xs": Rule(REJECTED, _CONVERTER + "get_tensors", SOURCE, "gguf"),
    "extra tensors": Rule(REJECTED, _CONVERTER + "get_tensors", SOURCE, "gguf"),
    "layer replication": Rule(REJECTED, _LLAMA_LOADER, SOURCE, "untie"),
    "experts": Rule(UNCHECKED, _CONVERTER + "modify_tensors"),
    "target expression": Rule(FINE, _CONVERTER + "get_tensors reads the tensors' names"),
    "part of attention": Rule(FINE, _LLAMA_LOADER),
    "incomplete site": Rule(REJECTED, _LLAMA_LOADER, RUN, "retrain"),
    "unselected": Rule(FINE, _CONVERTER + "get_tensors reads the tensors' names"),
    "prefix": Rule(UNCHECKED, _CONVERTER + "get_base_tensor_name"),
    "nan": Rule(WRONG, _LLAMA_LOADER + " checks no values", SOURCE, "retrain"),
    "scale 0": Rule(WRONG, _LLAMA_SCALE + " takes alpha 0 for scale 1", RUN, "gguf"),
    "zero update": Rule(IGNORED, _LLAMA_LOADER, RUN, "retrain"),
    "no base name": Rule(REJECTED, _CONVERTER + "load_hparams_from_hf; pass --base", SOURCE, "gguf"),
    "base name": Rule(FINE, _CONVERTER + "--base replaces it"),
    "other base": Rule(WRONG, _LLAMA_LOADER + " compares the architecture and shapes", SOURCE, "base"),
    "unknown name": Rule(REJECTED, _LLAMA_LOADER, SOURCE, "base"),
    "language model": Rule(FINE, _CONVERTER + "modify_tensors"),
    "unknown path": Rule(REJECTED, _LLAMA_LOADER, RUN, "base"),
    "shape": Rule(REJECTED, _LLAMA_LOADER, RUN, "base"),
    "missing sites": Rule(WRONG, _LLAMA_LOADER, RUN, "retrain"),
    "quantized base": Rule(UNCHECKED, "the GGUF file of the base is quantized differently"),
    "tied head": Rule(REJECTED, _CONVERTER + "modify_tensors; llama.cpp#9065", SOURCE, "merged gguf"),
    "tied embedding": Rule(
        REJECTED, "ggml/src/ggml.c: ggml_mul_mat aborts, because the head is adapted, too", RUN, "merged gguf"
    ),
    "tokenizer": Rule(IGNORED, _CONVERTER + "set_vocab", SOURCE, "merged"),
    "chat template": Rule(IGNORED, _CONVERTER + "set_vocab", SOURCE, "merged gguf"),
}

_MLX_LOADER = "mlx_lm/tuner/utils.py: load_adapters"

MLX: Mapping[str, Rule] = {
    "any adapter": Rule(REJECTED, _MLX_LOADER + " reads adapters.safetensors and num_layers", RUN, "mlx"),
    "other base": Rule(WRONG, _MLX_LOADER + " compares shapes", SOURCE, "base"),
    "tied head": Rule(REJECTED, _MLX_LOADER + "; mlx_lm/models/llama.py: Model.__init__", RUN, "untie"),
    "quantized base": Rule(UNCHECKED, "mlx_lm/utils.py: load_model"),
    "tokenizer": Rule(IGNORED, "mlx_lm/utils.py: load_tokenizer(model_path)", SOURCE, "merge"),
    "chat template": Rule(IGNORED, "mlx_lm/utils.py: load_tokenizer(model_path)", SOURCE, "merge"),
    "rope parameters": Rule(WRONG, "mlx_lm/models: ModelArgs.rope_theta", RUN, "theta"),
}

OLLAMA: Mapping[str, Rule] = {
    "any adapter": Rule(REJECTED, "ollama#14969, mellea#1651: ADAPTER creates no model", THREAD, "merged gguf"),
}

_PEFT_LOAD = "peft/utils/save_and_load.py: set_peft_model_state_dict"
_PEFT_WARNS = "peft/peft_model.py: from_pretrained warns of missing keys"
_FINE = Rule(FINE, "peft/tuners/lora", RUN)
_NO_EFFECT = Rule(IGNORED, "peft/tuners/lora/layer.py: update_layer", RUN, "retrain")

PEFT: Mapping[str, Rule] = {
    **dict.fromkeys(("rank", "rslora", "rank pattern", "alpha pattern", "dora", "lora bias"), _FINE),
    **dict.fromkeys(("bias", "kasa"), _FINE),
    **dict.fromkeys(("saved module", "classification head", "token rows", "alora", "init", "bd-lora"), _FINE),
    **dict.fromkeys(("qa-lora", "extra tensors", "layer replication", "experts", "target expression"), _FINE),
    **dict.fromkeys(("part of attention", "no base name", "base name", "tied head", "tied embedding"), _FINE),
    "new tokens": Rule(REJECTED, _PEFT_LOAD, RUN, "resize"),
    "resized embedding": Rule(REJECTED, _PEFT_LOAD, RUN, "resize"),
    "lora-xs": Rule(REJECTED, "peft/config.py: from_pretrained", RUN, "export"),
    "incomplete site": Rule(WRONG, _PEFT_WARNS, RUN, "retrain"),
    "unselected": Rule(IGNORED, _PEFT_LOAD + ": strict=False", RUN, "targets"),
    "prefix": Rule(IGNORED, _PEFT_LOAD + ": strict=False", RUN, "prefix"),
    "nan": Rule(WRONG, _PEFT_LOAD + " checks no values", RUN, "retrain"),
    "scale 0": _NO_EFFECT,
    "zero update": _NO_EFFECT,
    "other base": Rule(WRONG, "peft/peft_model.py: from_pretrained compares no base", RUN, "base"),
    "unknown name": Rule(IGNORED, _PEFT_LOAD + ": strict=False", RUN, "base"),
    "language model": Rule(IGNORED, _PEFT_LOAD + ": strict=False", RUN, "base"),
    "unknown path": Rule(IGNORED, _PEFT_LOAD + ": strict=False", RUN, "base"),
    "shape": Rule(REJECTED, _PEFT_LOAD, RUN, "base"),
    "grouped inputs": Rule(REJECTED, "peft/tuners/lora/variants.py: only a GPTQ base has QA-LoRA", RUN, "export"),
    "missing sites": Rule(WRONG, _PEFT_WARNS, RUN, "retrain"),
    "quantized base": Rule(FINE, "peft/tuners/lora/bnb.py, gptq.py, awq.py"),
    "tokenizer": Rule(FINE, "the program chooses the tokenizer"),
    "chat template": Rule(FINE, "the program chooses the tokenizer"),
}

RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime("0.32.0", VLLM),
    "sglang": Runtime("0.5.23", SGLANG),
    "llama.cpp": Runtime("2026-10", LLAMA_CPP),
    "ollama": Runtime("0.34.1", OLLAMA),
    "mlx": Runtime("0.32.2", MLX),
    "peft": Runtime("0.21.2", PEFT),
}
"""Name in `--for` -> runtime and its rules."""
