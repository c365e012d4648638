"""Adapted layers on a inc base, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.layer_classes": "IncLoraLinear",
    },
)
__all__ = __dir__()
