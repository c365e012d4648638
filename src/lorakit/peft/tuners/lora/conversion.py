"""Other adapters as LoRA, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.weighted": "convert_to_lora save_as_lora",
    },
)
__all__ = __dir__()
