"""Words and numbers that programs import from PEFT, with PEFT's values.

A dictionary of buffers, as torch has one of parameters; PEFT's layers of other methods hold theirs in it.

Questions about a model's parts that programs ask PEFT: names of modules, batch sizes, shared storage, devices.

Answers come from the model alone; what belongs to launchers that are not here is answered with "no".
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import CONFIG_FILE as CONFIG_NAME
from lorakit.core.quantization import base_of
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


class BufferDict(nn.Module):
    """Name -> buffer, moved and saved with the module that holds it.

    Attributes:
        persistent: Buffers are part of the state dict.
    """

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

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

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Drop every buffer."""
        self._buffers.clear()

    def pop(self, key: str) -> Tensor:
        """Take a buffer (…,) out."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Any]:
        """Names and buffers."""
        return self._buffers.items()

    def values(self) -> ValuesView[Any]:
        """The buffers."""
        return self._buffers.values()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Add buffers.

        Args:
            buffers: Name -> tensor (…), or pairs of them.

        Raises:
            TypeError: They are neither.
        """
        if not isinstance(buffers, (Mapping, Iterable, BufferDict)):
            raise TypeError(f"BuffersDict.update should be called with an iterable of pairs, got {type(buffers)}.")
        for key, buffer in buffers.items() if isinstance(buffers, (Mapping, BufferDict)) else buffers:
            self[key] = buffer

    def extra_repr(self) -> str:
        """One line per buffer."""
        return "\n".join(
            f"  ({key}): Buffer containing: [{type(buffer).__name__} of size {'x'.join(map(str, buffer.shape))}]"
            for key, buffer in self.items()
        )


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """A module's parent, the module, and its name in the parent.

    Args:
        model: The model.
        key: Dotted path.
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Rows of a batch.

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
    """The first pattern that fits the end of a path, or the path itself."""
    return next((key for key in pattern_keys if re.match(rf".*\.?({key})$", key_to_match)), key_to_match)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """A regular expression against a whole path."""
    return re.fullmatch(target_pattern, key)


def input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """Path of a model's input embedding, or a default where it does not say."""
    getter = getattr(model, "get_input_embeddings", None)
    wanted = getter() if callable(getter) else None
    return next((name for name, module in model.named_modules() if wanted is not None and module is wanted), default)


def names_tied_with_embedding(model: Any) -> list[str]:
    """Paths of modules whose weight is the input embedding's own, sorted; none where the config says untied."""
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
    """Class names of modules that must stay on one device."""
    found: set[str] = set()
    for module in model.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found


def fsdp_auto_wrap_policy(model: Any) -> Callable[..., bool]:
    """FSDP's policy for an adapted model: transformer blocks, and each trained leaf on its own.

    Args:
        model: The model; FSDP_TRANSFORMER_CLS_TO_WRAP may name the classes of its blocks.

    Raises:
        ConfigTypeError: No module is of a class that is named.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    words = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(no_split_modules(model))))
    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [word for word in words.split(",") if word and word not in classes]
    if missing:
        raise ConfigTypeError(f"Could not find the transformer layer class to wrap in the model: {missing[0]}.")
    blocks = {classes[word] for word in words.split(",") if word}
    leaves = partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    return partial(_or_policy, policies=[leaves, partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and bool(weight.requires_grad)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells one storage from another.

    Args:
        tensor: A tensor of any shape.
    """
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight (a, b) as (b, a) where it lies transposed."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def str_to_bool(value: str) -> int:
    """1 for a word that says yes, 0 for one that says no.

    Raises:
        ConfigError: It says neither.
    """
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ConfigError(f"invalid truth value {value}")


def get_quantization_config(model: Any, method: str) -> Any:
    """A model's quantisation config where it is of this method, else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Path of a module in a model, or ""."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: Any) -> dict[str, Any]:
    """Part of a model -> its device."""
    return getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}


@contextlib.contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """PEFT's block around a layer whose weights lie elsewhere; they do not here.

    Args:
        layer: The layer.

    Yields:
        Nothing.
    """
    yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A module's weight as numbers, (out, in), whatever it is stored in."""
    base = base_of(module)
    return base.read(module, base.stored(module, "weight"))


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed splits parameters: no, it is not supported here."""
    return False


@contextlib.contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> Iterator[None]:
    """PEFT's block around split parameters; none are split here.

    Args:
        param: Parameters.
        modifier_rank: PEFT's.
        fwd_module: PEFT's.

    Yields:
        Nothing.
    """
    yield


def get_layer_device_map(model: Any) -> None:
    """Layer -> device: None, since layers are where the model put them."""


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """A block in which modules are made without memory, on torch's meta device.

    Args:
        include_buffers: Accepted; buffers are made so too.

    Yields:
        Nothing.
    """
    with torch.device("meta"):
        yield


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's mark on functions that `init_empty_weights` must not touch; nothing has to be done here."""
    return func


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """How transformers' own loader has to rename an adapter's tensors, as a base's are renamed.

    Args:
        weight_conversions: What transformers does to the base's tensors.
        adapter_name: The adapter.
        peft_config: Its config.

    Raises:
        NotYetSupported: The adapter acts on what transformers puts together by now, not only renames (experts).
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
                f"The adapter names {', '.join(sorted(_joined_words(conversion)))}, which this version of transformers "
                "puts together into one tensor; joining their factors is not built. Load it with the version of "
                "transformers that it was made with."
            )
    return found


def _joined_words(conversion: Any) -> set[str]:
    """Last words of the modules whose tensors transformers puts together."""
    return {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in conversion.source_patterns}


def _concerns(conversion: Any, config: Any) -> bool:
    """Whether an adapter may have factors at modules that are put together; an expression may name anything."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str):
        return config is None or isinstance(targets, str)
    return not _joined_words(conversion).isdisjoint(target.rpartition(".")[2] for target in targets)


def unused(*_: Any, **__: Any) -> None:
    """PEFT's inner steps that have no counterpart here; calling one does nothing."""


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
