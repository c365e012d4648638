"""What libraries that put adapters into their own models call, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.mapping": "inject_adapter_in_model",
        "peft.injected": "delete_adapter set_adapter",
        "peft.casting": "cast_adapter_dtype",
        "peft.flags": "set_requires_grad",
        "peft.state_dicts": "get_peft_model_state_dict set_peft_model_state_dict",
    },
)
__all__ = __dir__()
