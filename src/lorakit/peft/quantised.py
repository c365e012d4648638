"""How a base's weight is quantised, under PEFT's names for its backends; the arithmetic is in `lorakit.core.bases`."""

from __future__ import annotations

from typing import Any

from torch import nn


class QuantizationBackend:
    """A way to quantise, by name.

    Attributes:
        backend_name: As a layer's status shows it.
    """

    backend_name = ""


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes in 4 bits."""

    backend_name = "bnb 4bit"


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes in 8 bits."""

    backend_name = "bnb 8bit"


class TorchaoBackend(QuantizationBackend):
    """torchao."""

    backend_name = "torchao"


class HqqBackend(QuantizationBackend):
    """HQQ."""

    backend_name = "hqq"


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A way that can be run and not read, such as GPTQ."""


GptqBackend = ForwardOnlyQuantizationBackend


def get_quantization_kwargs(model: Any) -> dict[str, Any]:
    """What PEFT's layers want to know of a quantised model; nothing here."""
    return {}


def quantization_extra_repr(module: nn.Module) -> str:
    """What PEFT's `repr` adds; nothing here."""
    return ""


def resolve_quantization_backend(module: nn.Module, **_: Any) -> QuantizationBackend | None:
    """The backend of a module's weight, or None where it is not quantised."""
    kinds = {"Linear4bit": Bnb4bitBackend, "Linear8bitLt": Bnb8bitBackend, "HQQLinear": HqqBackend}
    kind = kinds.get(type(module).__name__)
    return kind() if kind else None
