"""EVA under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.data_inits": "get_eva_state_dict initialize_lora_eva_weights",
    },
)
__all__ = __dir__()
