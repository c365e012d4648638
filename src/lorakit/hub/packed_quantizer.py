"""Quantizers for transformers' `from_pretrained` that keep the weights of quantized files packed, on every device.

The quantizers of transformers need packages or kernels that many machines lack, or dequantize all weights while loading
them. The ones in this file create the modules of `lorakit.core.quantization`, which dequantize one weight at a time.
They are registered under names of their own, through the extension point of transformers, so other callers of
`from_pretrained` are not affected.

Import this module inside functions only, because it imports transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import FineGrainedFP8Config
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.durable import JsonObject

PREFIX = "lorakit-"
"""Prefix of the names under which the quantizers are registered."""


class Fp8Quantizer(FineGrainedFP8HfQuantizer):
    """Loads fp8 weights with block scales without dequantizing them, on devices without kernels too."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device: `lorakit.core.quantization.fp8` provides a forward pass that needs no kernels."""


QUANTIZERS: dict[str, tuple[type[QuantizationConfigMixin], type[HfQuantizer]]] = {
    "fp8": (FineGrainedFP8Config, Fp8Quantizer),
}
"""Quantization method of the files -> the classes of its config and its quantizer."""


def kept_packed(values: JsonObject) -> JsonObject:
    """Return a quantization config with which `from_pretrained` keeps the weights packed.

    Args:
        values: The quantization config of the files, whose method is a key of `QUANTIZERS`.
    """
    method = str(values["quant_method"])
    name, (config, quantizer) = PREFIX + method, QUANTIZERS[method]
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(quantizer)
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config)
    return {**values, "quant_method": name}
