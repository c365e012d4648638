"""Adapted layers under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.layer_classes": """
            _ConvNd _LoraFactorsProxy _LoraParameterProxy Conv1d Conv2d Conv3d dispatch_default Embedding Linear
            LoraLayer LoraParallelLinear MultiheadAttention ParamWrapper
        """,
    },
)
__all__ = __dir__()
