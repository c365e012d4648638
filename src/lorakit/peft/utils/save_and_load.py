"""State dicts under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.state_dicts": """
            get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict
            set_peft_model_state_dict
        """,
        "peft.loaded": "load_peft_weights",
    },
)
__all__ = __dir__()
