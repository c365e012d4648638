"""Incremental principal components, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "elsewhere": "IncrementalPCA",
    },
)
__all__ = __dir__()
