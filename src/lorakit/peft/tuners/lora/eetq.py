"""Adapted layers on a eetq base, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.layer_classes": "EetqLoraLinear",
    },
)
__all__ = __dir__()
