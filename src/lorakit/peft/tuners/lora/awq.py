"""Adapted layers on a awq base, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.layer_classes": "AwqLoraLinear",
    },
)
__all__ = __dir__()
