"""Helpers under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.adjusting": """
            check_if_peft_model disable_input_dtype_casting DoraCaching rescale_adapter_scale
            update_forward_signature update_generate_signature update_signature
        """,
        "peft.kappa": "find_kappa_target_modules KappaTuneSelector",
        "elsewhere": "MontecloraTrainerMixin",
    },
)
__all__ = __dir__()
