"""PEFT's dictionary of buffers, under its module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.buffers": "BufferDict",
    },
)
__all__ = __dir__()
