"""How a base is quantised, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.quantised": """
            Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend get_quantization_kwargs GptqBackend
            HqqBackend quantization_extra_repr QuantizationBackend resolve_quantization_backend TorchaoBackend
        """,
    },
)
__all__ = __dir__()
