"""Trained rows of an embedding, by PEFT's names."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.wrappers": "TrainableTokensLayer",
    },
)
__all__ = __dir__()
