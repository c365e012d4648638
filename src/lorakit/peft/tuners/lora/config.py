"""Configs under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "config": """
            ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig
            LoraRuntimeConfig MontecloraConfig VeloraConfig
        """,
    },
)
__all__ = __dir__()
