"""VeLoRA under PEFT's module path; it is not built."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "elsewhere": """
            _compress_activations _normalize_projection _reconstruct_activations _reshape_to_grouped_subtokens
            VeloraFunction
        """,
    },
)
__all__ = __dir__()
