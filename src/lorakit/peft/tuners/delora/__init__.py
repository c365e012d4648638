"""DeLoRA by name; it cannot be made here."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "elsewhere": "DeloraConfig DeloraLayer DeloraModel",
    },
)
__all__ = __dir__()
