"""Names of older layouts of a base, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.structure": """
            build_peft_weight_mapping convert_peft_config_for_transformers get_model_conversion_mapping
        """,
    },
)
__all__ = __dir__()
