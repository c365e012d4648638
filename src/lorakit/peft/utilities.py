"""PEFT's utilities: constants, queries about a base model, preparation for training, and checks for optional packages.
Functions for unsupported backends, such as DeepSpeed, are absent or do nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from importlib import metadata
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from lorakit.architectures.families import DEFAULT_TARGETS
from lorakit.config import CONFIG_FILE as CONFIG_NAME
from lorakit.core.model.index import walk
from lorakit.core.quantization import weight_format_of
from lorakit.errors import ConfigTypeError
from lorakit.peft.model_adapters import HALF, user_model
from lorakit.targets.resolving import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND

__all__ = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND"]

Function = TypeVar("Function", bound=Callable[..., Any])
Ignored: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | str | int | None
"""Type of the arguments to PEFT functions that do nothing in lorakit: models, parameters and options."""


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
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = dict(DEFAULT_TARGETS)
"""Default targets for each model type; PEFT uses the same name, and programs may add entries."""


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return a module's parent, the module itself, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """Return the first pattern that matches the end of a path, or the path itself if none does."""
    return next((key for key in pattern_keys if re.match(rf".*\.?({key})$", key_to_match)), key_to_match)


def names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Return the sorted paths of modules that share the input embedding weight, or [] if the config disables tying."""
    user = user_model(model)
    getter = getattr(user, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    weight = getattr(embedding, "weight", None)
    if weight is None or not getattr(getattr(user, "config", None), "tie_word_embeddings", True):
        return []
    return sorted(name for name, m in walk(user) if m is not embedding and m._parameters.get("weight") is weight)


def no_split_modules(model: nn.Module) -> set[str]:
    """Return the class names of modules that must not be split across devices."""
    return {name for _, module in walk(model) for name in getattr(module, "_no_split_modules", None) or ()}


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return an FSDP policy that wraps transformer blocks and, separately, each trainable leaf module.

    Raises:
        ConfigTypeError: One of the block classes does not occur in the model.
    """
    from torch.distributed.fsdp.wrap import (
        _or_policy,  # noqa: PLC2701  torch has no public one
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(no_split_modules(model))))
    classes = {type(module).__name__: type(module) for _, module in walk(model)}
    missing = [name for name in names.split(",") if name and name not in classes]
    if missing:
        text = f"Could not find the transformer layer class to wrap in the model: {missing[0]}."
        raise ConfigTypeError(text, what=missing[0], field="FSDP_TRANSFORMER_CLS_TO_WRAP", allowed=classes)
    blocks = {classes[name] for name in names.split(",") if name}
    leaves = partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    return partial(_or_policy, policies=[leaves, partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)])


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and bool(weight.requires_grad)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return a weight, (a, b), transposed to (b, a) if `fan_in_fan_out` is true."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """Return a model's quantization config if the model is quantized with the given method, else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


@contextlib.contextmanager
def empty_context(*_: Ignored, **__: Ignored) -> Iterator[None]:
    """Do nothing; this context manager replaces PEFT's context managers that move, gather or cast tensors."""
    yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Return a module's dequantized weight, (out, in)."""
    base = weight_format_of(module)
    return base.read(module, base.stored(module, "weight"))


def init_empty_weights(include_buffers: bool | None = None) -> torch.device:
    """Return a context manager that creates modules on torch's meta device, where they use no memory."""
    return torch.device("meta")


def skip_init_on_device(func: Function) -> Function:
    """Return a function that creates modules on the CPU even if it is called within `init_empty_weights`."""

    @wraps(func)
    def on_device(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu") if torch.get_default_device().type == "meta" else contextlib.nullcontext():
            return func(*args, **kwargs)

    return on_device  # type: ignore[return-value]


DENSE_METHODS = ("gptq", "aqlm", "eetq", "torchao", "hqq")
"""Quantization methods for which the unquantized tensors stay in half precision."""


def checkpoints(model: nn.Module) -> bool:
    """Return whether a model uses gradient checkpointing; the attribute to read depends on the transformers version."""
    newer = getattr(model, "is_activation_checkpointing", None)
    return bool(newer if newer is not None else getattr(model, "is_gradient_checkpointing", False))


def take_gradients_at_the_input(model: nn.Module) -> None:
    """Make the input embedding's output require gradients, as reentrant gradient checkpointing needs."""
    quantized = any(getattr(model, f"is_{name}", False) for name in ("loaded_in_8bit", "loaded_in_4bit", "quantized"))
    if not quantized:
        _require_input_gradients(model)


def _require_input_gradients(model: nn.Module) -> None:
    if hasattr(model, "enable_input_require_grads"):
        attrgetter("enable_input_require_grads")(model)()
    else:
        embedding = attrgetter("get_input_embeddings")(model)()
        embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True))


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantized base, upcast its unquantized tensors (but for DENSE_METHODS), and enable checkpointing."""
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    quantized = method in DENSE_METHODS or bool(getattr(model, "hqq_quantized", False))
    in_bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad = False
        if not quantized and parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if not quantized and auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (in_bits or quantized) and use_gradient_checkpointing:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            _require_input_gradients(model)
        attrgetter("gradient_checkpointing_enable")(model)(gradient_checkpointing_kwargs=options)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to a half-precision dtype, and trainable ones to fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Turn labels (rows, tokens) into decoder inputs: a start token, then labels, with padding for masked ones.

    Raises:
        ValueError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = torch.roll(input_ids, 1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def infer_device() -> str:
    """Return the type of the available device: "cuda", "mps", "xpu" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if is_xpu_available() else "cpu"


class QuantizationBackend:
    """Base class for the backends of quantization methods, named as in a layer's status."""

    backend_name = ""


class Bnb4bitBackend(QuantizationBackend):
    """Backend for bitsandbytes 4-bit quantization."""

    backend_name = "bnb 4bit"


class Bnb8bitBackend(QuantizationBackend):
    """Backend for bitsandbytes 8-bit quantization."""

    backend_name = "bnb 8bit"


class TorchaoBackend(QuantizationBackend):
    """Backend for torchao quantization."""

    backend_name = "torchao"


class HqqBackend(QuantizationBackend):
    """Backend for HQQ quantization."""

    backend_name = "hqq"


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """Backend for a quantization method whose weights cannot be read, such as GPTQ."""


GptqBackend = ForwardOnlyQuantizationBackend


def resolve_quantization_backend(module: nn.Module, **_: Ignored) -> QuantizationBackend | None:
    """Return the quantization backend of a module, or None if its weight is not quantized."""
    kinds = {"Linear4bit": Bnb4bitBackend, "Linear8bitLt": Bnb8bitBackend, "HQQLinear": HqqBackend}
    if type(module._parameters.get("weight")).__module__.startswith("torchao."):
        return TorchaoBackend()
    kind = kinds.get(type(module).__name__)
    return kind() if kind else None


def _installed(package: str, check_device: bool = True) -> bool:
    return find_spec(package) is not None


is_aqlm_available = partial(_installed, "aqlm")
is_bnb_available = is_bnb_4bit_available = partial(_installed, "bitsandbytes")
is_diffusers_available = partial(_installed, "diffusers")
is_eetq_available = partial(_installed, "eetq")
is_gptqmodel_available = partial(_installed, "gptqmodel")
is_hqq_available = partial(_installed, "hqq")
is_inc_available = partial(_installed, "neural_compressor")
is_optimum_available = partial(_installed, "optimum")
is_te_available = is_te_pytorch_available = partial(_installed, "transformer_engine")
is_torch_tpu_available = partial(_installed, "torch_xla")
is_torchao_available = partial(_installed, "torchao")
is_transformers_le_4_53 = False


def is_xpu_available(check_device: bool = False) -> bool:
    """Return whether an Intel GPU is available."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def is_torchao_ge_v0_18_0() -> bool:
    """Return whether torchao 0.18 or newer is installed."""
    return is_torchao_available() and _release("torchao") >= (0, 18)


def _release(package: str) -> tuple[int, ...]:
    words = metadata.version(package).split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, word)) or 0) for word in words)


DTENSOR_SINCE = (5, 17)
"""Release of transformers since which tensor parallelism uses DTensors."""


def __getattr__(name: str) -> bool:
    """Compute constants such as `is_transformers_ge_v5_1_0` on access, so that importing this module is cheap."""
    if name == "is_transformers_dtensor_tp":
        return _release("transformers") >= DTENSOR_SINCE
    release = re.fullmatch(r"is_transformers_ge_v(\d+(?:_\d+)*)", name)
    if release is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _release("transformers") >= tuple(map(int, release[1].split("_")[:2]))
