"""DeLoRA's model and its table of default targets by name; the table is empty here."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "elsewhere": "DeloraModel TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING",
    },
)
__all__ = __dir__()
