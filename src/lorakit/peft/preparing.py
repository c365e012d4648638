"""Preparing a base for training, PEFT's names of quantization backends, and which optional packages are installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)
DENSE_METHODS = ("gptq", "aqlm", "eetq", "torchao", "hqq")
"""Quantization methods whose unquantized tensors keep their half precision."""


def checkpoints(model: Any) -> bool:
    """Return whether a transformers model uses gradient checkpointing; the attribute differs by version."""
    newer = getattr(model, "is_activation_checkpointing", None)
    return bool(newer if newer is not None else getattr(model, "is_gradient_checkpointing", False))


def take_gradients_at_the_input(model: Any) -> None:
    """Make the output of the input embedding require gradients, as reentrant gradient checkpointing needs.

    Args:
        model: A model; a quantized one does it by itself.
    """
    quantized = any(getattr(model, f"is_{name}", False) for name in ("loaded_in_8bit", "loaded_in_4bit", "quantized"))
    can = hasattr(model, "enable_input_require_grads") or hasattr(model, "get_input_embeddings")
    if can and not quantized:
        _require_input_gradients(model)


def _require_input_gradients(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a quantized base, upcast what is not quantized to fp32, and enable gradient checkpointing.

    Args:
        model: The base, changed in place.
        use_gradient_checkpointing: Enable it if the base is quantized.
        gradient_checkpointing_kwargs: Its options.
        auto_clear_cache: Release cached GPU memory.

    Returns:
        The same model.
    """
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    hqq = bool(getattr(model, "hqq_quantized", False))
    quantized = method in DENSE_METHODS or hqq
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
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to a half-precision dtype, and trained ones to fp32.

    Args:
        model: The model, changed in place.
        dtype: dtype of frozen parameters.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Return labels as a decoder's inputs: shifted one position to the right, the start token first.

    Args:
        input_ids: (rows, tokens).
        pad_token_id: Replaces masked labels.
        decoder_start_token_id: The first token.

    Returns:
        (rows, tokens).

    Raises:
        ValueError: The pad token is None.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = torch.roll(input_ids, 1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def infer_device() -> str:
    """Return the available type of device: "cuda", "mps", "xpu" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if is_xpu_available() else "cpu"


class QuantizationBackend:
    """A quantization method.

    Attributes:
        backend_name: Its name in a layer's status.
    """

    backend_name = ""


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes 4-bit."""

    backend_name = "bnb 4bit"


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes 8-bit."""

    backend_name = "bnb 8bit"


class TorchaoBackend(QuantizationBackend):
    """torchao."""

    backend_name = "torchao"


class HqqBackend(QuantizationBackend):
    """HQQ."""

    backend_name = "hqq"


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A method whose weights cannot be read, such as GPTQ."""


GptqBackend = ForwardOnlyQuantizationBackend


def get_quantization_kwargs(model: Any) -> dict[str, Any]:
    """Return no arguments for layers of a quantized model; layers need none here."""
    return {}


def quantization_extra_repr(module: nn.Module) -> str:
    """Return nothing to add to the `repr` of a quantized layer."""
    return ""


def resolve_quantization_backend(module: nn.Module, **_: Any) -> QuantizationBackend | None:
    """Return the backend of a module's weight, or None if it is not quantized."""
    kinds = {"Linear4bit": Bnb4bitBackend, "Linear8bitLt": Bnb8bitBackend, "HQQLinear": HqqBackend}
    kind = kinds.get(type(module).__name__)
    return kind() if kind else None


def _installed(package: str, *_: Any, **__: Any) -> bool:
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
    """Return whether an Intel GPU is available.

    Args:
        check_device: Ignored; the device is always looked for.
    """
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def is_torchao_ge_v0_18_0() -> bool:
    """Return whether torchao is installed in release 0.18 or newer."""
    return is_torchao_available() and _release("torchao") >= (0, 18)


def _release(package: str) -> tuple[int, ...]:
    words = metadata.version(package).split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, word)) or 0) for word in words)


def __getattr__(name: str) -> Any:
    """Compute PEFT's constants such as `is_transformers_ge_v5_1_0`; importing this module reads no versions."""
    release = re.fullmatch(r"is_transformers_ge_v(\d+(?:_\d+)*)", name)
    if release is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _release("transformers") >= tuple(map(int, release[1].split("_")[:2]))
