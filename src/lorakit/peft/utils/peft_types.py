"""Words under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "config": "PeftType TaskType",
        "peft.registering": "register_peft_method",
    },
)
__all__ = __dir__()
