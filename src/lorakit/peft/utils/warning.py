"""Warnings under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.warnings_and_errors": "PeftWarning",
    },
)
__all__ = __dir__()
