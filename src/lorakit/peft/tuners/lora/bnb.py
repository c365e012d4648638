"""Adapted layers on a bnb base, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.layer_classes": "dispatch_bnb_4bit dispatch_bnb_8bit Linear4bit Linear8bitLt",
    },
)
__all__ = __dir__()
