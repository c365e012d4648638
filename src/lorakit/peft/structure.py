"""Constants, a dictionary of buffers and questions about a model's modules, as programs import them from PEFT.

The answers come from the model alone. What belongs to launchers that are not supported, such as DeepSpeed, is absent or
does nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import CONFIG_FILE as CONFIG_NAME
from lorakit.core.quantization import weight_format_of
from lorakit.errors import ConfigError, ConfigTypeError, NotYetSupported
from lorakit.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND

__all__ = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND"]


WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, object] = {}


class BufferDict(nn.Module, MutableMapping[str, Tensor]):
    """A dictionary of buffers, which move and are saved with the module that holds it; PEFT's other methods use it.

    Attributes:
        persistent: Buffers are part of the state dict.
    """

    __eq__, __hash__ = nn.Module.__eq__, nn.Module.__hash__

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def extra_repr(self) -> str:
        """Return one line per buffer."""
        return "\n".join(
            f"  ({key}): Buffer containing: [{type(buffer).__name__} of size {'x'.join(map(str, buffer.shape))}]"
            for key, buffer in self.items()
        )


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return a module's parent, the module, and its name in the parent.

    Args:
        model: The model.
        key: Dotted path.
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Return the number of rows of a batch.

    Args:
        input_ids: (rows, tokens), or None.
        inputs_embeds: (rows, tokens, width), or None.

    Raises:
        ConfigError: Both are None.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ConfigError("You have to provide either input_ids or inputs_embeds")
    return int(given.shape[0])


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """Return the first pattern that matches the end of a path, or the path itself."""
    return next((key for key in pattern_keys if re.match(rf".*\.?({key})$", key_to_match)), key_to_match)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Match a regular expression against a whole path."""
    return re.fullmatch(target_pattern, key)


def input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """Return the path of a model's input embedding, or the default if it has none."""
    getter = getattr(model, "get_input_embeddings", None)
    wanted = getter() if callable(getter) else None
    return next((name for name, module in model.named_modules() if wanted is not None and module is wanted), default)


def names_tied_with_embedding(model: Any) -> list[str]:
    """Return the sorted paths of modules that share the input embedding's weight; none if the config says untied."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(getattr(inner, "config", None), "tie_word_embeddings", True):
        return []
    getter = getattr(inner, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    weight = getattr(embedding, "weight", None)
    return sorted(
        name
        for name, module in inner.named_modules()
        if weight is not None and module is not embedding and module._parameters.get("weight") is weight
    )


def no_split_modules(model: Any) -> set[str]:
    """Return the class names of modules that must stay on one device."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def fsdp_auto_wrap_policy(model: Any) -> Callable[..., bool]:
    """Return FSDP's wrapping policy for an adapted model: transformer blocks, and each trained leaf separately.

    Args:
        model: The model; the variable FSDP_TRANSFORMER_CLS_TO_WRAP may name the classes of its blocks.

    Raises:
        ConfigTypeError: A named class has no module.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(no_split_modules(model))))
    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in names.split(",") if name and name not in classes]
    if missing:
        raise ConfigTypeError(f"Could not find the transformer layer class to wrap in the model: {missing[0]}.")
    blocks = {classes[name] for name in names.split(",") if name}
    leaves = partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    return partial(_or_policy, policies=[leaves, partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and bool(weight.requires_grad)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return the identity of a tensor's storage: device, address and size in bytes.

    Args:
        tensor: A tensor of any shape.
    """
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return a weight (a, b), transposed to (b, a) if `fan_in_fan_out`."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def str_to_bool(value: str) -> int:
    """Return 1 for a string such as "yes", 0 for one such as "no".

    Raises:
        ConfigError: It is neither.
    """
    if value.lower() not in ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"):
        raise ConfigError(f"invalid truth value {value}")
    return int(value.lower() in ("y", "yes", "t", "true", "on", "1"))


def get_quantization_config(model: Any, method: str) -> Any:
    """Return a model's quantization config if it is quantized by this method, or None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Return the path of a module in a model, or ""."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: Any) -> dict[str, Any]:
    """Return module -> device."""
    return getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}


@contextlib.contextmanager
def empty_context(*_: Any, **__: Any) -> Iterator[None]:
    """Do nothing, for PEFT's contexts that move, gather or cast what is in place here."""
    yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Return a module's weight dequantized, (out, in)."""
    base = weight_format_of(module)
    return base.read(module, base.stored(module, "weight"))


def check_deepspeed_zero3_enabled() -> bool:
    """Return False: sharding by DeepSpeed is not supported."""
    return False


def init_empty_weights(include_buffers: bool | None = None) -> torch.device:
    """Return a context in which modules are created without memory, on torch's meta device.

    Args:
        include_buffers: Ignored; buffers are created there too.
    """
    return torch.device("meta")


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; PEFT marks functions that `init_empty_weights` must not change, which needs nothing here."""
    return func


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Return how transformers' loader must rename an adapter's tensors when it renames the base's.

    Args:
        weight_conversions: Conversions of the base's tensors.
        adapter_name: The adapter.
        peft_config: Its config.

    Raises:
        NotYetSupported: The adapter targets weights that transformers now joins (experts), not only renames.
    """
    if not weight_conversions:
        return []
    from lorakit.hub.packaged import renaming

    found = [renaming("base_model.model.model.", "model."), renaming("base_model.model.", "")]
    found.append(renaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"))
    for conversion in weight_conversions:
        if type(conversion).__name__ == "WeightRenaming":
            found.append(conversion)
        elif _concerns(conversion, peft_config):
            raise NotYetSupported(
                f"The adapter names {', '.join(sorted(_joined_names(conversion)))}, which this version of transformers "
                "puts together into one tensor; joining their factors is not built. Load it with the version of "
                "transformers that it was made with."
            )
    return found


def _joined_names(conversion: Any) -> set[str]:
    """Return the last names of the modules whose tensors transformers joins."""
    return {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in conversion.source_patterns}


def _concerns(conversion: Any, config: Any) -> bool:
    """Return whether an adapter may have factors at joined modules; a regular expression may match any module."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str):
        return config is None or isinstance(targets, str)
    return not _joined_names(conversion).isdisjoint(target.rpartition(".")[2] for target in targets)


def unused(*_: Any, **__: Any) -> None:
    """Do nothing, for PEFT's inner steps that have no counterpart here."""


def is_valid_match(key: str, target_key: str) -> bool:
    """Return whether a path is `target_key` or ends in it after a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def get_model_conversion_mapping(model: Any) -> list[Any]:
    """Return what transformers converts when it loads the model: nothing, since adapters are loaded as they are."""
    return []


def get_bnb_param_type(parameter: Tensor) -> str | bool:
    """Return "4bit" or "8bit" for a parameter of bitsandbytes, and False for any other.

    Args:
        parameter: A tensor of any shape.
    """
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(parameter).__name__, False)
