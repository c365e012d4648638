"""Hot swapping under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.swapping": """
            check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict
            prepare_model_for_compiled_hotswap
        """,
    },
)
__all__ = __dir__()
