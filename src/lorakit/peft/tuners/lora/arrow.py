"""Arrow under PEFT's module path; it is not built."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "elsewhere": "_resolve_adapter_source ArrowLoraLinearLayer create_arrow_model",
    },
)
__all__ = __dir__()
